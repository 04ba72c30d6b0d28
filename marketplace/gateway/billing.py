"""From an answer to its charge.

The law: a settlement that has begun is carried to its end, whoever stops waiting for it; a request's hold
has one owner at a time (the request until its settlement begins, then the settlement, then the poster) and
is ended exactly once.  What cannot be posted because the ledger takes nothing just now is tried again for
a minute if the buyer has had the answer (he is told that the bill is open); an answer that he will not get
is not billed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from functools import lru_cache
from typing import Any, Final, TypeVar
from uuid import UUID

from marketplace.fabric.node_ids import node_uuid
from marketplace.gateway import metrics
from marketplace.gateway.answer_shapes import UsageOut
from marketplace.gateway.ports import LedgerAccounts
from marketplace.gateway.receipts_writer import Attempt, Drift, Hashes, ReceiptWriter
from marketplace.gateway.session import Session
from marketplace.ledger.charges import FINISH_CHARACTERS_MAX, MODEL_CHARACTERS_MAX, Charge
from marketplace.ledger.errors import LedgerError, LedgerUnavailable
from marketplace.ledger.lease_book import Hold
from marketplace.ledger.lease_keeper import LeaseKeeper
from marketplace.ledger.money import ZERO, cost, dollars, split
from marketplace.ledger.poster import Poster
from marketplace.metering.counting import CountedOn
from marketplace.metering.settlement import Usage, settle
from marketplace.platform.clock import Clock

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

BIG_TEXT_BYTES: Final = 16_384
"""Counting more text and ids than this (about 8 ms) leaves the event loop for a thread."""
RECORD_S_MAX: Final = 1.0
"""A refusal waits this long for its usage row; it is worth nothing, so it leaves without it if need be."""
RETRY_PAUSES_S: Final = (1, 2, 4, 8, 15, 30)
CLOSE_S_MAX: Final = 10


class Billing:
    """Counts, prices and posts, for one gateway process."""

    def __init__(
        self,
        *,
        poster: Poster,
        keeper: LeaseKeeper,
        receipts: ReceiptWriter,
        accounts: LedgerAccounts,
        clock: Clock,
    ) -> None:
        self._poster = poster
        self._receipts = receipts
        self._keeper = keeper
        self._accounts = accounts
        self._clock = clock
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def is_ready(self) -> bool:
        """What is served now can be charged."""
        return self._poster.is_ready

    async def close(self) -> None:
        """Carry what has begun to its end; before the poster closes."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=CLOSE_S_MAX)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def settle(self, session: Session, *, status: int) -> UsageOut:
        """Count, price and post the session's answer; returns once the charge is durable.

        Raises what `Poster.post` does.  The hold is no longer the session's, come what may.
        """
        hold, session.hold = session.hold, None
        session.is_recorded = True
        session.status = status
        return await self._to_the_end(self._settle(session, hold, status))

    async def _settle(self, session: Session, hold: Hold | None, status: int) -> UsageOut:
        is_ours = True
        try:
            usage = await self._count(session)
            noted = self._note(session, usage)
            try:
                charge = await self._attempt(session, hold, usage, status)
            except LedgerUnavailable:
                if status == 200 and not session.has_streamed:  # a whole answer, which he will not get
                    session.is_charged = False
                else:
                    self._start(self._attempt_later(session, hold, usage, status))
                    is_ours = False
                raise
        finally:
            if hold is not None and is_ours:
                self._keeper.release(hold)  # harmless once the poster has it
        await noted
        _measure(charge)
        return UsageOut(
            prompt_tokens=usage.tokens_in,
            completion_tokens=usage.tokens_out,
            total_tokens=usage.tokens_in + usage.tokens_out,
            cost=dollars(charge.amount),
            cost_nano=charge.amount.n,
            receipt_id=str(charge.id),
            counted_by=usage.counted_by.name.lower(),
            counted_on=usage.counted_on.name.lower(),
        )

    def _note(self, session: Session, usage: Usage) -> asyncio.Future[bool]:
        """Have written beside the charge what its receipt needs; and a node's drift."""
        node, answer = session.node, session.answer
        assert node is not None
        assert answer is not None
        if usage.is_drifting:
            metrics.DRIFT.inc()
            _log.warning("a node counts otherwise than we do", extra=session.log_fields)
            self._receipts.drifted(
                Drift(
                    session.request_id, node_uuid(node.node_id), session.model,
                    prompt_counted=session.prompt_tokens, prompt_reported=answer.prompt_reported,
                    completion_counted=usage.completion_counted,
                    completion_reported=answer.completion_reported,
                )
            )  # fmt: skip
        return self._receipts.note(
            Hashes(session.request_id, session.request_sha256, answer.response_sha256(), usage.counted_on)
        )

    def record_attempt(self, session: Session, reason: str) -> None:
        """Have on record that the session's node has seen the prompt, and did not answer it (V8)."""
        assert session.node is not None
        node = node_uuid(session.node.node_id)
        self._receipts.failed(Attempt(session.request_id, session.tries, node, session.model, reason))

    async def record_refusal(self, session: Session, *, status: int, code: str) -> None:
        """Give a refused request of a known buyer its usage row, at a cost of zero (R17)."""
        if session.is_recorded or not session.buyer or status == 429:  # a flood must not fill the ledger
            return
        session.is_recorded = True
        await asyncio.wait({self._start(self._record(session, status, code))}, timeout=RECORD_S_MAX)

    async def _record(self, session: Session, status: int, code: str) -> None:
        node = session.node
        charge = Charge(
            id=session.request_id,
            buyer=session.buyer,
            operator=None if node is None else await self._accounts.operator(UUID(node.operator_id)),
            node=None if node is None else node_uuid(node.node_id),
            model=session.model[:MODEL_CHARACTERS_MAX],
            key_id=session.key_id,
            latency_ms=self._elapsed_ms(session, self._clock.monotonic()),
            status=status,
            finish=code[:FINISH_CHARACTERS_MAX],
            stream=session.is_stream,
        )
        await self._poster.post(charge)

    # ---- counting and pricing

    async def _count(self, session: Session) -> Usage:
        answer, counter, request = session.answer, session.counter, session.request
        assert answer is not None
        assert counter is not None
        assert request is not None
        written = answer.written()
        stops = request.stops
        # Told which tokens to sample, an engine may write what is no text; the buyer has asked for it.
        is_favoured = any(bias > 0 for bias in (request.logit_bias or {}).values())
        ignores_end = bool(request.ignore_eos or request.allowed_token_ids or is_favoured)

        def count() -> tuple[int, CountedOn]:
            counts = [
                counter.completion_tokens(choice, stops=stops, ignores_end=ignores_end) for choice in written
            ]
            return sum(tokens for tokens, _ in counts), max((on for _, on in counts), default=CountedOn.IDS)

        is_big = sum(len(choice.everything) + len(choice.ids) for choice in written) > BIG_TEXT_BYTES
        completion_counted, counted_on = await asyncio.to_thread(count) if is_big else count()
        return settle(
            prompt_counted=session.prompt_tokens,
            prompt_reported=answer.prompt_reported,
            completion_counted=completion_counted,
            completion_reported=answer.completion_reported,
            completion_limit=session.max_tokens * session.choices,
            counted_on=counted_on,
        )

    async def _charge(self, session: Session, hold: Hold | None, usage: Usage, status: int) -> Charge:
        node, answer = session.node, session.answer
        assert node is not None
        assert answer is not None
        amount = cost(
            tokens_in=usage.tokens_in, tokens_out=usage.tokens_out,
            price_in=node.price_in, price_out=node.price_out,
        )  # fmt: skip
        amount = min(amount, ZERO if hold is None else hold.amount)  # V2
        first = session.first_delta
        return Charge(
            id=session.request_id,
            buyer=session.buyer,
            amount=amount,
            fee=split(amount)[1],
            operator=await self._accounts.operator(_person(node.operator_id)),
            node=node_uuid(node.node_id),
            model=session.model,
            key_id=session.key_id,
            tok_in=usage.tokens_in,
            tok_out=usage.tokens_out,
            counted_by=usage.counted_by,
            price_version=node.price_version,
            latency_ms=self._elapsed_ms(session, self._clock.monotonic()),
            ttft_ms=None if first is None else self._elapsed_ms(session, first),
            status=status,
            finish=answer.finish_reason,
            stream=session.is_stream,
        )

    def _elapsed_ms(self, session: Session, until: float) -> int:
        return int((until - session.started) * 1000)

    # ---- posting

    async def _attempt(self, session: Session, hold: Hold | None, usage: Usage, status: int) -> Charge:
        charge = await self._charge(session, hold, usage, status)
        await self._poster.post(charge, hold if charge.amount != ZERO else None)
        return charge

    async def _attempt_later(self, session: Session, hold: Hold | None, usage: Usage, status: int) -> None:
        try:
            for pause_s in RETRY_PAUSES_S:
                await asyncio.sleep(pause_s)
                try:
                    _measure(await self._attempt(session, hold, usage, status))
                except LedgerUnavailable:
                    continue
                return
            _log.critical(
                "what a request costs could not be posted (%d and %d tokens)",
                usage.tokens_in, usage.tokens_out, extra=session.log_fields,
            )  # fmt: skip
        finally:
            if hold is not None:
                self._keeper.release(hold)

    async def _to_the_end(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Wait for work that goes on even if nobody waits for it any more."""
        return await asyncio.shield(self._start(work))

    def _start(self, work: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            level = logging.WARNING if isinstance(error, LedgerError) else logging.ERROR
            _log.log(level, "a settlement failed: %s", type(error).__name__)


@lru_cache(maxsize=16_384)
def _person(operator_id: str) -> UUID:
    return UUID(operator_id)


def _measure(charge: Charge) -> None:
    metrics.TOKENS_IN.inc(charge.tok_in)
    metrics.TOKENS_OUT.inc(charge.tok_out)
    metrics.CHARGED_NANO.inc(charge.amount.n)
