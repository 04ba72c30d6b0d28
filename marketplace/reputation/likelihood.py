"""How likely an answer is under the model it is sold as.  Pure.

The reference engine reads prompt and answer at once (prefill only) and says for each token how probable it
and the likeliest others were.  Whoever samples honestly is, over many tokens, about as surprising as the
model expects of itself: the mean of `log p(token)` is near minus the mean entropy, however uncertain the
model is.  Another model's text is more surprising than that.  So what is judged is

    surprise = mean log p(token) + mean entropy            (thousandths of a nat; honest: around zero)

Seen with SmolLM2-135M, 64 tokens: its own answers from +1,070 (greedy) to -1,300 (temperature 1), those of
another model under its name from -1,960 to -5,650; the bare mean, -4,750 against -5,440, hardly tells them
apart.
What this cannot show: a near twin, such as a light quantisation, or sampling that is only a little off.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from marketplace.reputation.standing import Policy

LOGPROB_MIN: Final = -100.0
"""What is impossible counts as this, so that one token cannot outweigh all others."""


@dataclass(frozen=True, slots=True)
class Likelihood:
    """An answer's means over its tokens, in thousandths of a nat."""

    tokens: int
    mean_milli: int
    """Of the log-probability."""
    entropy_milli: int
    """Of what the model expected: a lower bound from its likeliest tokens."""

    @property
    def surprise_milli(self) -> int:
        """Below zero: more surprising than the model expects of itself."""
        return self.mean_milli + self.entropy_milli

    def is_suspicious(self, policy: Policy) -> bool:
        """Tell whether this is not the model's own text; never with too few tokens to tell."""
        return self.tokens >= policy.tokens_min and self.surprise_milli < policy.surprise_milli_min


def likelihood(read: Sequence[tuple[float, Sequence[float]]]) -> Likelihood:
    """Sum up (log-probability, those of the likeliest tokens) of each token.

    >>> likelihood([(math.log(0.5), [math.log(0.5), math.log(0.5)])] * 20)
    Likelihood(tokens=20, mean_milli=-693, entropy_milli=693)
    """
    if not read:
        return Likelihood(0, 0, 0)
    mean = sum(_bounded(logprob) for logprob, _ in read) / len(read)
    entropy = sum(_entropy(likeliest) for _, likeliest in read) / len(read)
    return Likelihood(len(read), round(1000 * mean), round(1000 * entropy))


def _entropy(likeliest: Sequence[float]) -> float:
    """Bound the entropy from below: whatever is not listed is at most as likely as the last listed."""
    listed = [_bounded(logprob) for logprob in likeliest]
    if not listed:
        return 0.0
    rest = max(0.0, 1.0 - sum(map(math.exp, listed)))
    return sum(-math.exp(logprob) * logprob for logprob in listed) - rest * min(listed)


def _bounded(logprob: float) -> float:
    return min(0.0, max(LOGPROB_MIN, logprob)) if math.isfinite(logprob) else LOGPROB_MIN
