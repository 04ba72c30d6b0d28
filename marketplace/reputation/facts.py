"""What the database knows of how operators' nodes serve, as `standing` wants it.

Sources: `routing_tallies` (answered, failed, time to the first token; every gateway's own), `charges` by way
of hourly sums of lengths, `metering_drift`, `reputation_checks`, `node_offences`.  Nothing here holds a
prompt or an answer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any, Final
from uuid import UUID

import msgspec
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from marketplace.fabric.node_ids import node_id_of
from marketplace.ledger.ids import lowest_at
from marketplace.reputation.standing import Lengths, NodeFacts, Policy

KEPT: Final = timedelta(days=30)
SETTLED_AFTER: Final = timedelta(minutes=11)
"""A charge's id is its request's arrival; by then the longest request has been charged."""
PASS: Final = timedelta(hours=6)
"""Of charges read in one go."""

_POLICY: Final = text("SELECT policy FROM reputation_policies ORDER BY id DESC LIMIT 1")
_SET_POLICY: Final = text("""
    INSERT INTO reputation_policies (policy, actor, reason, at)
    VALUES (CAST(:policy AS jsonb), :actor, :reason, :now)
""")
_NODES: Final = text("SELECT id, operator_id FROM nodes")
_TALLIES: Final = text("""
    SELECT node_id, model, outcome, sum(requests) AS requests, sum(own) AS own FROM routing_tallies
    WHERE hour >= :since AND outcome IN ('answered', 'failed', 'first_token') GROUP BY node_id, model, outcome
""")
_LENGTHS: Final = text("""
    SELECT node, model, sum(completions) AS completions, sum(tokens) AS tokens,
        sum(tokens_squared) AS tokens_squared
    FROM reputation_lengths WHERE hour >= :since GROUP BY node, model
""")
_DRIFTS: Final = text("""
    SELECT node, model, count(*) AS drifts FROM metering_drift
    WHERE at >= :since
        AND (completion_reported > completion_counted OR prompt_reported > prompt_counted)
    GROUP BY node, model
""")
_CHECKS: Final = text("""
    SELECT node_id, model, count(*) AS checks, count(*) FILTER (WHERE is_suspicious) AS suspicious
    FROM reputation_checks WHERE at >= :since GROUP BY node_id, model
""")
_OFFENCES: Final = text(
    "SELECT node_id, count(*) AS offences FROM node_offences WHERE at >= :since GROUP BY node_id"
)
_MARK: Final = text("SELECT up_to FROM reputation_mark FOR UPDATE")
_SET_MARK: Final = text("UPDATE reputation_mark SET up_to = :up_to")
_ADD_LENGTHS: Final = text("""
    INSERT INTO reputation_lengths AS l (node, model, hour, completions, tokens, tokens_squared)
    SELECT node, model, date_trunc('hour', CAST(:begin AS timestamptz)), count(*), sum(tok_out),
        sum(CAST(tok_out AS numeric) * tok_out)
    FROM charges
    WHERE id >= :first AND id < :last AND node IS NOT NULL AND status = 200 AND tok_out > 0
    GROUP BY node, model
    ON CONFLICT (node, model, hour) DO UPDATE SET
        completions = l.completions + excluded.completions,
        tokens = l.tokens + excluded.tokens,
        tokens_squared = l.tokens_squared + excluded.tokens_squared
""")
_DROP: Final = (
    text("DELETE FROM reputation_lengths WHERE hour < :before"),
    text("DELETE FROM reputation_checks WHERE at < :before"),
)

Offer = tuple[str, str]
"""Node and model."""


async def read_policy(connection: AsyncConnection) -> Policy:
    """Give the thresholds in force."""
    found = await connection.scalar(_POLICY)
    return Policy() if found is None else msgspec.convert(found, Policy)


async def set_policy(
    connection: AsyncConnection, policy: Policy, *, actor: str, reason: str, now: datetime
) -> None:
    """Put other thresholds in force, on record."""
    encoded = msgspec.json.encode(policy).decode()
    await connection.execute(_SET_POLICY, {"policy": encoded, "actor": actor, "reason": reason, "now": now})


async def add_lengths(connection: AsyncConnection, *, now: datetime) -> None:
    """Read the charges of the hours that have passed since the last time, each once."""
    up_to: datetime = (await connection.execute(_MARK)).scalar_one()
    end = min(now - SETTLED_AFTER, up_to + PASS)
    begin = up_to
    while begin < end:
        hour = begin.replace(minute=0, second=0, microsecond=0) + timedelta(hours=1)
        until = min(end, hour)
        await connection.execute(
            _ADD_LENGTHS, {"begin": begin, "first": lowest_at(begin), "last": lowest_at(until)}
        )
        begin = until
    if begin > up_to:
        await connection.execute(_SET_MARK, {"up_to": begin})
        for drop in _DROP:
            await connection.execute(drop, {"before": now - KEPT})


async def read_facts(
    connection: AsyncConnection, *, since: datetime, forgiven: dict[UUID, datetime] | None = None
) -> dict[UUID, list[NodeFacts]]:
    """Give the facts since `since` per operator, for each node and model that has any.

    `forgiven`: of these operators only what came later counts against them.
    """
    owners = {row.id: row.operator_id for row in await connection.execute(_NODES)}
    everybody = await _read(connection, since)
    facts: dict[UUID, list[NodeFacts]] = defaultdict(list)
    by_model: dict[str, list[tuple[UUID, NodeFacts]]] = defaultdict(list)
    for (node, model), found in everybody.items():
        if node in owners:
            by_model[model].append((owners[node], found))
    for offers in by_model.values():
        for operator in {owner for owner, _ in offers}:
            own = [found for owner, found in offers if owner == operator]
            others = _together([found for owner, found in offers if owner != operator])
            facts[operator] += [_beside(found, others) for found in own]
    for operator, at in (forgiven or {}).items():
        if operator in facts and at > since:
            facts[operator] = await _since_forgiven(connection, facts[operator], at)
    return dict(facts)


async def _since_forgiven(
    connection: AsyncConnection, facts: list[NodeFacts], at: datetime
) -> list[NodeFacts]:
    """Keep what others did, and take the operator's own anew from `at` on."""
    later = await _read(connection, at)
    return [
        _beside(later.get((old.node_id, old.model), NodeFacts(old.node_id, old.model)), _others_of(old))
        for old in facts
    ]


def _others_of(found: NodeFacts) -> NodeFacts:
    return NodeFacts(
        "", found.model,
        first_token_ms=found.others_first_token_ms, lengths=found.others_lengths,
        checks=found.others_checks, suspicious=found.others_suspicious,
    )  # fmt: skip


def _beside(found: NodeFacts, others: NodeFacts) -> NodeFacts:
    return replace(
        found,
        others_first_token_ms=others.first_token_ms,
        others_lengths=others.lengths,
        others_checks=others.checks,
        others_suspicious=others.suspicious,
    )


def _together(facts: Collection[NodeFacts]) -> NodeFacts:
    """Add up what others with the same model did."""
    timed = [found for found in facts if found.first_token_ms is not None and found.answered]
    answered = sum(found.answered for found in timed)
    latency = sum((found.first_token_ms or 0) * found.answered for found in timed)
    return NodeFacts(
        "", "",
        first_token_ms=latency // answered if answered else None,
        lengths=Lengths(
            sum(found.lengths.completions for found in facts),
            sum(found.lengths.tokens for found in facts),
            sum(found.lengths.tokens_squared for found in facts),
        ),
        checks=sum(found.checks for found in facts),
        suspicious=sum(found.suspicious for found in facts),
    )  # fmt: skip


async def _read(connection: AsyncConnection, since: datetime) -> dict[Offer, NodeFacts]:
    found: dict[Offer, dict[str, Any]] = defaultdict(dict)
    hour = {"since": since.replace(minute=0, second=0, microsecond=0)}
    exact = {"since": since}
    for row in await connection.execute(_TALLIES, hour):
        told = found[row.node_id, row.model]
        if row.outcome == "first_token":
            told["first_token_ms"] = int(row.own) // int(row.requests)
        else:
            told[row.outcome] = int(row.requests)
    for row in await connection.execute(_LENGTHS, hour):
        sums = Lengths(int(row.completions), int(row.tokens), int(row.tokens_squared))
        found[node_id_of(row.node), row.model]["lengths"] = sums
    for row in await connection.execute(_DRIFTS, exact):
        found[node_id_of(row.node), row.model]["drifts"] = int(row.drifts)
    for row in await connection.execute(_CHECKS, exact):
        found[row.node_id, row.model] |= {"checks": int(row.checks), "suspicious": int(row.suspicious)}
    _add_offences(found, (await connection.execute(_OFFENCES, exact)).all())
    return {offer: NodeFacts(*offer, **fields) for offer, fields in found.items()}


def _add_offences(found: dict[Offer, dict[str, Any]], rows: Iterable[Any]) -> None:
    """An offence is the node's, whatever it serves: count it with one of its models."""
    first = {node: (node, model) for node, model in sorted(found, reverse=True)}
    for row in rows:
        found[first.get(row.node_id, (row.node_id, ""))]["offences"] = int(row.offences)
