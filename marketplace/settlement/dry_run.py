"""Finding the payees a batch cannot pay, so that one of them never stops the others (A41).

A rail names them where it can.  Where it only says that the whole batch reverts, halves are tried until
the ones that revert alone are known.  If every payee reverts alone the fault is the chain's (a paused token,
an empty escrow), not theirs: the plan is refused and nobody is split off (A42).
"""

from __future__ import annotations

from collections.abc import Sequence

from chain.errors import Reverted
from chain.ports import PayoutLine, PayoutRail, Unsigned
from marketplace.settlement.errors import PlanRefused


async def prepare(rail: PayoutRail, lines: Sequence[PayoutLine]) -> tuple[Unsigned | None, dict[str, str]]:
    """Give what will be signed for the payable lines (None if none is), and why the others are not.

    PlanRefused if the batch reverts for no payee's fault; chain faults pass through.
    """
    refused: dict[str, str] = {}
    rest = list(lines)
    while rest:
        try:
            return await rail.prepare(rest), refused
        except Reverted as e:
            found = named(e) or await _search(rail, rest)
            if not found:
                raise PlanRefused(f"the dry run fails: {e}", code="dry_run_failed") from e
        refused |= found
        rest = [line for line in rest if line.payout_id not in refused]
    return None, refused


def named(error: Reverted) -> dict[str, str]:
    """The payees a rail's error names, by payout id, with the reason; both rails' spellings are read."""
    reasons = getattr(error, "reasons", None)
    if isinstance(reasons, dict):
        return {str(payout): str(why) for payout, why in reasons.items()}
    payout = getattr(error, "payout_id", None)
    return {} if payout is None else {str(payout): str(error)}


async def _search(rail: PayoutRail, lines: Sequence[PayoutLine]) -> dict[str, str]:
    """Which lines revert on their own; empty if all or none do."""
    found = await _halve(rail, lines)
    return found if len(found) < len(lines) else {}


async def _halve(rail: PayoutRail, lines: Sequence[PayoutLine]) -> dict[str, str]:
    if len(lines) == 1:
        return await _try(rail, lines)
    middle = len(lines) // 2
    found: dict[str, str] = {}
    for half in (lines[:middle], lines[middle:]):
        failure = await _try(rail, half)
        if failure:
            found |= failure if len(half) == 1 else await _halve(rail, half)
    return found


async def _try(rail: PayoutRail, lines: Sequence[PayoutLine]) -> dict[str, str]:
    """Empty if these can be paid together, else the failure under the first one's id."""
    try:
        await rail.prepare(lines)
    except Reverted as e:
        return named(e) or {lines[0].payout_id: str(e)}
    return {}
