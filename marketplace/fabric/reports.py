"""Why an operator's nodes were, or were not, chosen: the sums every gateway adds, and what they mean.

What the outcomes are and how they are found: `marketplace.routing.tally`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from marketplace.ledger.money import Nano, dollars

KEPT: Final = timedelta(days=8)
HOURS_MAX: Final = 168
ROWS_MAX: Final = 20_000
CHOSEN: Final = "chosen"

Row = tuple[str, str, str, int, int, int]
"""(node, model, outcome, requests, sum of the node's numbers, sum of the winners')"""

_ADD: Final = text("""
    INSERT INTO routing_tallies (node_id, hour, model, outcome, requests, own, winner)
    SELECT given.node_id, date_trunc('hour', CAST(:now AS timestamptz)), given.model, given.outcome,
        given.requests, given.own, given.winner
    FROM unnest(CAST(:nodes AS text[]), CAST(:models AS text[]), CAST(:outcomes AS text[]),
        CAST(:requests AS bigint[]), CAST(:own AS numeric[]), CAST(:winner AS numeric[]))
        AS given (node_id, model, outcome, requests, own, winner)
    JOIN nodes ON nodes.id = given.node_id
    ORDER BY given.node_id, given.model, given.outcome
    ON CONFLICT (node_id, hour, model, outcome) DO UPDATE SET
        requests = routing_tallies.requests + excluded.requests,
        own = routing_tallies.own + excluded.own,
        winner = routing_tallies.winner + excluded.winner
""")
_DROP: Final = text("DELETE FROM routing_tallies WHERE hour < :before")
_READ: Final = text("""
    SELECT nodes.id, nodes.name, t.model, t.outcome,
        sum(t.requests) AS requests, sum(t.own) AS own, sum(t.winner) AS winner
    FROM nodes JOIN routing_tallies t ON t.node_id = nodes.id
    WHERE nodes.operator_id = :operator AND t.hour >= date_trunc('hour', CAST(:since AS timestamptz))
        AND t.outcome NOT IN ('answered', 'failed', 'first_token')
    GROUP BY nodes.id, nodes.name, t.model, t.outcome
    ORDER BY nodes.id DESC, t.model, requests DESC, t.outcome
    LIMIT :rows
""")

UNITS: Final[Mapping[str, str]] = {
    "price": "nano_per_million_tokens",
    "latency": "ms",
    "load": "permille",
}
_SENTENCES: Final[Mapping[str, str]] = {
    "price": "others were cheaper: they asked ${winner} per million tokens on average, you ${own}",
    "latency": "others were faster: {winner} ms to the first token on average, yours {own} ms",
    "load": "others had more room: {winner} of their places in use on average, {own} of yours",
    "recent_failure": "the node had failed a moment before; it is asked less until that is a minute old",
    "drawn_lower": "the node was among the best; the draw fell on another, as it must for some",
    "silent": "nothing was heard from the node for a minute: is the agent running and connected?",
    "draining": "the node was stopping and takes no new requests",
    "not_ready": "the engine was not ready: see `tollway-node doctor`",
    "failing": "less than 90 % of the node's requests succeeded in five minutes",
    "full": "all places were taken; more capacity would serve more",
    "context_too_small": "the requests need a longer context than the node offers",
    "price_above_maximum": "the buyers set a highest price below the node's",
    "not_chosen_by_buyer": "the buyers asked for other operators or nodes",
    "nobody_eligible": "the node could have served, but not on the buyers' terms",
}


@dataclass(frozen=True, slots=True)
class Loss:
    """One reason why requests went to others; `own` and `winner` are averages, None without meaning."""

    reason: str
    requests: int
    own: int | None
    winner: int | None

    @property
    def unit(self) -> str | None:
        return UNITS.get(self.reason)

    @property
    def message(self) -> str:
        """One sentence for a person."""
        sentence = _SENTENCES.get(self.reason, self.reason)
        if self.own is None or self.winner is None:
            return sentence
        return sentence.format(own=_shown(self.own, self.unit), winner=_shown(self.winner, self.unit))


@dataclass(slots=True)
class ModelReport:
    """One node's offer of one model."""

    model: str
    considered: int = 0
    chosen: int = 0
    lost: list[Loss] = field(default_factory=list)


@dataclass(slots=True)
class NodeReport:
    node_id: str
    name: str
    models: list[ModelReport] = field(default_factory=list)


async def add(connection: AsyncConnection, rows: Iterable[Row], *, now: datetime) -> None:
    """Add one gateway's sums to the current hour, and drop what is older than `KEPT`."""
    columns = list(zip(*rows, strict=True))
    if not columns:
        return
    nodes, models, outcomes, requests, own, winner = columns
    await connection.execute(
        _ADD,
        {
            "now": now, "nodes": list(nodes), "models": list(models), "outcomes": list(outcomes),
            "requests": list(requests), "own": list(own), "winner": list(winner),
        },
    )  # fmt: skip
    await connection.execute(_DROP, {"before": now - KEPT})


async def read(connection: AsyncConnection, operator: UUID, *, since: datetime) -> list[NodeReport]:
    """Give what became of the operator's nodes since the hour of `since`, newest node first."""
    rows = (await connection.execute(_READ, {"operator": operator, "since": since, "rows": ROWS_MAX})).all()
    reports: dict[str, NodeReport] = {}
    models: dict[tuple[str, str], ModelReport] = {}
    for row in rows:
        report = reports.setdefault(row.id, NodeReport(row.id, row.name))
        key = (row.id, row.model)
        if key not in models:
            models[key] = ModelReport(row.model)
            report.models.append(models[key])
        model, requests = models[key], int(row.requests)
        model.considered += requests
        if row.outcome == CHOSEN:
            model.chosen += requests
            continue
        has_numbers = row.outcome in UNITS
        model.lost.append(
            Loss(
                row.outcome,
                requests,
                int(row.own) // requests if has_numbers else None,
                int(row.winner) // requests if has_numbers else None,
            )
        )
    return list(reports.values())


def _shown(number: int, unit: str | None) -> str:
    match unit:
        case "nano_per_million_tokens":
            return dollars(Nano(number))
        case "permille":
            return f"{number // 10} %"
        case _:
            return str(number)
