"""What is billed for a request: bounds before, counts after.  Pure.

The marketplace counts; the operator's `usage` is a cross-check.  Billed is min(reported, verified), each
side of the request for itself, so an operator gains nothing by saying more and a mistake of ours never
bills more than the operator claims.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from marketplace.ledger.charges import CountedBy
from marketplace.ledger.money import Nano, cost
from marketplace.metering.counting import CountedOn

DRIFT_TOKENS: Final = 16
DRIFT_PERCENT: Final = 2
"""A57: more than 2 % or more than 16 tokens apart is drift (whichever allows more)."""


@dataclass(frozen=True, slots=True)
class Usage:
    """A request's billed tokens and how they came about."""

    tokens_in: int
    tokens_out: int
    counted_by: CountedBy
    is_drifting: bool
    """The operator's word and our count are too far apart; counts against the node."""
    completion_counted: int = 0
    """Our own count of what was delivered."""
    counted_on: CountedOn = CountedOn.IDS


def is_drift(reported: int, counted: int) -> bool:
    """Tell whether two counts are further apart than tokenization at the edges explains.

    >>> is_drift(116, 100), is_drift(117, 100), is_drift(2041, 2000), is_drift(2040, 2000)
    (False, True, True, False)
    """
    return abs(reported - counted) > max(DRIFT_TOKENS, counted * DRIFT_PERCENT // 100)


def settle(
    *,
    prompt_counted: int,
    prompt_reported: int | None,
    completion_counted: int,
    completion_reported: int | None,
    completion_limit: int,
    counted_on: CountedOn = CountedOn.IDS,
) -> Usage:
    """Decide what is billed.  Reported counts are None where the node told none that made sense.

    `completion_limit` is what the node was allowed (its limit per choice times the choices): what it
    generated beyond that it generated for itself.

    Nothing delivered is nothing owed, the prompt included: a node that dies before its first token has
    done no work anybody can check.

    >>> settle(prompt_counted=10, prompt_reported=10, completion_counted=5,
    ...        completion_reported=500, completion_limit=50).tokens_out
    5
    """
    if completion_counted == 0:
        drifting = completion_reported is not None and is_drift(completion_reported, 0)
        return Usage(0, 0, CountedBy.GATEWAY, drifting, 0, counted_on)
    tokens_in, tokens_out = prompt_counted, min(completion_counted, completion_limit)
    by = CountedBy.GATEWAY
    drifting = completion_counted > completion_limit
    if prompt_reported is not None:
        drifting |= is_drift(prompt_reported, prompt_counted)
        tokens_in = min(tokens_in, prompt_reported)
    if completion_reported is not None:
        drifting |= is_drift(completion_reported, completion_counted)
        if completion_reported < tokens_out:
            tokens_out, by = completion_reported, CountedBy.NODE
    return Usage(tokens_in, tokens_out, by, drifting, completion_counted, counted_on)


def hold_for(*, prompt_tokens: int, max_tokens: int, choices: int, price_in: int, price_out: int) -> Nano:
    """Worst-case cost: the whole prompt and every permitted completion token of every choice."""
    return cost(
        tokens_in=prompt_tokens, tokens_out=max_tokens * choices, price_in=price_in, price_out=price_out
    )


def affordable_tokens(
    *, available: Nano, prompt_tokens: int, choices: int, price_in: int, price_out: int
) -> int:
    """How many completion tokens per choice `available` covers beside the prompt; 0 if not even one.

    >>> affordable_tokens(available=Nano(1_000), prompt_tokens=10, choices=1, price_in=50_000_000,
    ...                   price_out=100_000_000)
    5
    """
    left = available.n * 1_000_000 - prompt_tokens * price_in
    if left < 0:
        return 0
    if price_out == 0:
        return 1 << 31
    return left // (price_out * choices)
