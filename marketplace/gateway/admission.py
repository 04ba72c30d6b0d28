"""Who may ask how much: a key's and its account's own limits, before anything is chosen or held.

Requests per minute, tokens per minute, requests at once, dollars per day, models: each limit of the account
binds all its keys together, each of the key that key alone, and both hold over all gateway processes
(`platform.allotments`).  Tokens and dollars are taken at their worst case and what was not used is given
back, so a limit is never passed; where less is left than a request might use, its answer is cut to what is
left, as with the balance.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final

from marketplace.gateway.ports import KeyFacts
from marketplace.ledger.money import Nano, dollars
from marketplace.platform.allotments import (
    MINUTE_MS,
    Allotments,
    AllotmentsUnavailable,
    Ceiling,
    Grant,
    Refused,
)
from marketplace.platform.http import Refusal
from marketplace.platform.limits import NO_ALLOWANCE, Allowance, Rule, SharedLimits, Taken

DAY_MS: Final = 86_400_000
UNNAMED_SHARE: Final = 4
"""Who names no limit to his answer gets at most a quarter of a minute's tokens for it."""
RETRY_HELD_S: Final = 1


@lru_cache(maxsize=10_000)
def _ceiling(rule: str, units: int, window_ms: int) -> Ceiling:
    return Ceiling(rule, units, window_ms)


@dataclass(slots=True)
class Reserved:
    """What one request has taken of its limits; `Admission.leave` gives back what it did not use."""

    held: list[Grant] = field(default_factory=list)
    tokens: list[Grant] = field(default_factory=list)
    nano: list[Grant] = field(default_factory=list)


class Admission:
    """Holds requests to the limits of their key and account."""

    def __init__(self, limits: SharedLimits, allotments: Allotments) -> None:
        self._limits = limits
        self._allotments = allotments

    async def enter(self, key: KeyFacts, *, is_counted: bool) -> tuple[Taken | None, Reserved | None]:
        """Count a request; Refusal 429 above a limit.  `is_counted`: the account's is counted already.

        Gives how the tighter of the request limits stands, and what to hand to `leave`.
        """
        taken = None
        if not is_counted:
            taken = await self._limits.count(Rule.CHAT, key.person_id, key.account.requests_per_minute)
            if not taken.allowed:
                return taken, None
        if key.allowance is NO_ALLOWANCE and key.account is NO_ALLOWANCE:
            return taken, None  # the usual case
        if key.allowance.requests_per_minute is not None:
            mine = await self._limits.count(
                Rule.CHAT, key.key_id, key.allowance.requests_per_minute, subject=f"key:{key.key_id}"
            )
            if taken is None or not mine.allowed or mine.remaining < taken.remaining:
                taken = mine
            if not taken.allowed:
                return taken, None
        reserved = Reserved()
        try:
            await self._enter_parallel(key, reserved)
        except BaseException:
            self.leave(reserved, tokens=0, nano=0)
            raise
        return taken, reserved

    async def _enter_parallel(self, key: KeyFacts, reserved: Reserved) -> None:
        for subject, allowance in _subjects(key):
            if allowance.parallel_requests is None:
                continue
            ceiling = _ceiling("parallel", allowance.parallel_requests, 0)
            reserved.held.append(
                await self._take(
                    subject, ceiling, 1, 1,
                    f"at most {ceiling.units} requests at once", code="too_many_at_once", wait_s=RETRY_HELD_S,
                )
            )  # fmt: skip

    async def tokens(
        self, key: KeyFacts, reserved: Reserved, *, prompt: int, wanted: int, least: int, choices: int,
        is_named: bool,
    ) -> int:  # fmt: skip
        """Take a request's tokens of the minute's; give how many each choice may have, from least to wanted.

        `is_named`: the buyer named `wanted` himself.  Refusal 429 where not even `least` is left.
        """
        for subject, allowance in _subjects(key):
            if allowance.tokens_per_minute is None:
                continue
            ceiling = _ceiling("tokens", allowance.tokens_per_minute, MINUTE_MS)
            at_least = prompt + least * choices
            units = prompt + wanted * choices
            if not is_named:
                units = max(at_least, min(units, ceiling.units // UNNAMED_SHARE))
            grant = await self._take(
                subject, ceiling, min(units, max(ceiling.units, at_least)), at_least,
                f"at most {ceiling.units} tokens a minute; this request takes {at_least} or more",
                code="token_limit_exceeded",
            )  # fmt: skip
            reserved.tokens.append(grant)
            wanted = (grant.units - prompt) // choices
        return wanted

    async def spend(self, key: KeyFacts, reserved: Reserved, *, most: Nano, least: Nano) -> Nano:
        """Take a request's worst case of the day's dollars, from least to most; Refusal 402 below."""
        for subject, allowance in _subjects(key):
            if allowance.spend_nano_per_day is None:
                continue
            ceiling = _ceiling("spend", allowance.spend_nano_per_day, DAY_MS)
            grant = await self._take(
                subject, ceiling, min(most.n, max(ceiling.units, least.n)), least.n,
                f"at most ${dollars(Nano(ceiling.units))} a day; this request may cost ${dollars(least)}",
                code="spend_limit_reached", status=402,
            )  # fmt: skip
            reserved.nano.append(grant)
            most = Nano(grant.units)
        return most

    def take_back(self, reserved: Reserved) -> None:
        """Give back tokens and dollars, not the place among those at once: the request begins again."""
        for grants in (reserved.tokens, reserved.nano):
            for grant in grants:
                self._allotments.give_back(grant, grant.units)
            grants.clear()

    def leave(self, reserved: Reserved, *, tokens: int | None, nano: int | None) -> None:
        """The request is over and used so many; None: nobody knows, all counts as used."""
        for grant in reserved.held:
            self._allotments.give_back(grant, grant.units)
        for grants, used in ((reserved.tokens, tokens), (reserved.nano, nano)):
            for grant in grants:
                self._allotments.give_back(grant, 0 if used is None else grant.units - used)

    async def _take(
        self, subject: str, ceiling: Ceiling, units: int, least: int, words: str, *, code: str,
        status: int = 429, wait_s: int | None = None,
    ) -> Grant:  # fmt: skip
        try:
            grant = self._allotments.take_now(subject, ceiling, units)
            answer = grant or await self._allotments.take(subject, ceiling, units, least=least)
        except AllotmentsUnavailable as e:
            raise Refusal(
                503, "limits_unavailable", "limits cannot be checked just now", retry_after_s=2
            ) from e
        if isinstance(answer, Refused):
            whose = "this key" if subject.startswith("key:") else "this account"
            raise Refusal(status, code, f"{whose} is allowed {words}", retry_after_s=wait_s or answer.wait_s)
        return answer


def may_use(key: KeyFacts, model: str) -> bool:
    """Tell whether key and account may use a model."""
    return all(
        allowance.models is None or model in allowance.models for allowance in (key.account, key.allowance)
    )


def _subjects(key: KeyFacts) -> Iterator[tuple[str, Allowance]]:
    if key.account is not NO_ALLOWANCE:
        yield f"person:{key.person_id}", key.account
    if key.allowance is not NO_ALLOWANCE:
        yield f"key:{key.key_id}", key.allowance
