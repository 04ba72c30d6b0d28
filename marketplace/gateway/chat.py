"""Serving one chat request, from key to last byte.

key → limits → parse and bound → choose nodes → authorise from the lease → relay → count → post the charge
→ last byte.  The law:

* nothing leaves for a node before its worst-case cost is covered by a lease in the database (V1);
* another node may take over only before the first part of an answer (at most two retries, same hold,
  same price ceiling);
* the last byte waits for the commit of the charge, so bytes delivered mean a usage row (V6);
* a buyer who leaves pays for what was delivered, and the node is told to stop;
* prompts and completions are never logged.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import logging
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final
from uuid import UUID

from marketplace.fabric.errors import FabricUnavailable, ProtocolBroken, RequestBroken
from marketplace.fabric.node_client import AnswerFrame, NodeClient
from marketplace.fabric.node_ids import node_uuid
from marketplace.gateway import metrics
from marketplace.gateway.answer import DONE, Answer, UsageOut, encode, error_event
from marketplace.gateway.ports import Keys, LedgerAccounts, Shelf
from marketplace.gateway.requests import ChatRequest, engine_body, parse_chat, template_messages
from marketplace.gateway.responder import BuyerGone, Headers, Responder
from marketplace.ledger.charges import Charge
from marketplace.ledger.errors import InsufficientFunds, LedgerError, LedgerFault
from marketplace.ledger.lease_book import Hold
from marketplace.ledger.lease_keeper import LeaseKeeper
from marketplace.ledger.money import ZERO, Nano, cost, dollars, split
from marketplace.ledger.poster import Poster
from marketplace.metering.counting import PromptRefused, TokenCounter
from marketplace.metering.settlement import Usage, affordable_tokens, hold_for, settle
from marketplace.platform.clock import Clock
from marketplace.platform.http import Refusal
from marketplace.platform.ids import uuid7
from marketplace.platform.limits import RateLimits, Rule, Taken, client_address
from marketplace.routing.choice import (
    NO_PREFERENCES,
    Decision,
    NodeView,
    Preferences,
    Question,
    Sort,
    choose,
    summary,
)
from marketplace.routing.registry import Outcome, Registry
from node_agent.protocol import VERSION, WALL_MS_MAX, Delta, End, Request

_log = logging.getLogger(__name__)

BIG_TEXT_CHARACTERS: Final = 16_384
"""Counting more than this (about 8 ms) leaves the event loop for a thread."""
NODES_RETRY_AFTER_S: Final = 5
LEDGER_RETRY_AFTER_S: Final = 2
EXPECTED_COMPLETION_TOKENS: Final = 256
"""Where the buyer names no limit: in which proportion a node's two prices matter."""
BUYER_LEFT: Final = 499
"""Status of a usage row whose buyer closed the connection; nginx' number for it."""


@dataclass(slots=True)
class Session:
    """One request's facts, filled in as it is served."""

    request_id: UUID
    started: float
    """Monotonic seconds."""
    key_id: UUID | None = None
    person_id: UUID | None = None
    buyer: int = 0
    model: str = ""
    is_stream: bool = False
    prompt_tokens: int = 0
    max_tokens: int = 0
    clamped_from: int | None = None
    hold: Hold | None = None
    node: NodeView | None = None
    decision: Decision | None = None
    answer: Answer | None = None
    first_delta: float | None = None
    taken: Taken | None = None
    held_back: list[Delta] = field(default_factory=list)


class ChatService:
    """Serves `POST /v1/chat/completions` for one gateway process."""

    def __init__(
        self,
        *,
        keys: Keys,
        limits: RateLimits,
        shelf: Shelf[TokenCounter],
        registry: Registry,
        nodes: NodeClient,
        keeper: LeaseKeeper,
        poster: Poster,
        accounts: LedgerAccounts,
        clock: Clock,
        secret: bytes,
        trusted_proxies: frozenset[str] = frozenset(),
    ) -> None:
        self._keys = keys
        self._limits = limits
        self._shelf = shelf
        self._registry = registry
        self._nodes = nodes
        self._keeper = keeper
        self._poster = poster
        self._accounts = accounts
        self._clock = clock
        self._secret = secret
        self._trusted_proxies = trusted_proxies

    async def serve(self, responder: Responder) -> None:
        """Answer one request; every way out has an answer in OpenAI's shape."""
        session = Session(uuid7(), self._clock.monotonic())
        metrics.IN_FLIGHT.inc()
        try:
            await self._serve(responder, session)
        except Refusal as refusal:
            await self._record_failure(session, refusal.status, refusal.code)
            responder.answer(refusal.status, self._refusal_headers(session, refusal), encode(refusal.body()))
        except BuyerGone:
            pass  # settled where it was noticed
        except LedgerFault as e:
            _log.warning("request %s: the ledger is away: %s", session.request_id, e)
            self._refuse_late(responder, session, Refusal(
                503, "ledger_unavailable", "billing is briefly unavailable; try again",
                retry_after_s=LEDGER_RETRY_AFTER_S,
            ))  # fmt: skip
        except Exception:  # the last line of defence: no buyer is left without an answer
            _log.exception("request %s failed", session.request_id)
            self._refuse_late(
                responder, session, Refusal(500, "internal_error", "an error of ours; it is logged")
            )
        finally:
            if session.hold is not None:
                self._keeper.release(session.hold)  # harmless once its charge is posted
            metrics.IN_FLIGHT.dec()
            metrics.SECONDS.observe(self._clock.monotonic() - session.started)

    def _refuse_late(self, responder: Responder, session: Session, refusal: Refusal) -> None:
        """Refuse, whether or not the stream has begun."""
        if session.is_stream and session.answer is not None and session.answer.has_begun:
            responder.end(error_event(refusal.body()))
        else:
            responder.answer(refusal.status, self._refusal_headers(session, refusal), encode(refusal.body()))

    # ---- admission

    async def _serve(self, responder: Responder, session: Session) -> None:
        await self._authenticate(responder, session)
        assert session.person_id is not None
        session.taken = self._limits.take(Rule.CHAT, session.person_id)
        if not session.taken.allowed:
            raise session.taken.refusal()
        request = parse_chat(responder.body)
        session.is_stream = request.is_stream
        model = self._shelf.model(request.model)
        if model is None:
            raise Refusal(404, "model_not_found", f"no model is named {request.model!r}", param="model")
        session.model = model.name
        session.buyer = await self._accounts.buyer(session.person_id)
        counter = await self._shelf.counter_of(model.name)
        session.prompt_tokens = await self._count_prompt(counter, request)
        if session.prompt_tokens >= model.context:
            raise Refusal(
                400, "context_length_exceeded",
                f"the prompt has {session.prompt_tokens} tokens, {model.name} takes {model.context} in all",
                param="messages",
            )  # fmt: skip
        candidates = self._choose(session, request)
        await self._authorise(session, request, candidates, model.context)
        await self._relay(responder, session, request, candidates, counter)

    async def _authenticate(self, responder: Responder, session: Session) -> None:
        try:
            session.key_id, session.person_id = await self._key(responder)
        except Refusal:
            forwarded = responder.headers.get(b"x-forwarded-for", b"").decode("latin-1") or None
            address = client_address(responder.peer, forwarded, self._trusted_proxies)
            session.taken = self._limits.take(Rule.UNAUTHENTICATED, address)
            if not session.taken.allowed:
                raise session.taken.refusal() from None
            raise

    async def _key(self, responder: Responder) -> tuple[UUID, UUID]:
        """Give (key, person) of the presented key; Refusal 401, or 503 when keys cannot be checked."""
        if responder.has_query:
            raise Refusal(
                400, "query_refused", "this path takes no query string; keys belong in Authorization"
            )
        presented = responder.headers.get(b"authorization", b"")
        scheme, _, key = presented.partition(b" ")
        if scheme.lower() != b"bearer" or not key:
            raise Refusal(401, "missing_credentials", "send your key: `Authorization: Bearer sk-tollway-…`")
        if not self._keys.is_fresh:
            raise Refusal(503, "credentials_unavailable", "keys cannot be checked just now", retry_after_s=2)
        text = key.decode("latin-1").strip()
        found = self._keys.lookup(text) or await self._keys.find(text)
        if found is None:
            raise Refusal(
                401, "invalid_api_key", "this API key does not work: it is mistyped, unknown or revoked"
            )
        if "inference" not in found.scopes:
            raise Refusal(403, "missing_scope", "this key lacks the scope 'inference'")
        return found.key_id, found.person_id

    async def _count_prompt(self, counter: TokenCounter, request: ChatRequest) -> int:
        messages = template_messages(request)
        size = sum(len(message.get("content") or "") for message in messages)
        try:
            if size > BIG_TEXT_CHARACTERS:
                ids = await asyncio.to_thread(counter.prompt_ids, messages, request.tools)
            else:
                ids = counter.prompt_ids(messages, request.tools)
        except PromptRefused as e:
            raise Refusal(400, "invalid_messages", str(e), param="messages") from e
        return len(ids)

    def _choose(self, session: Session, request: ChatRequest) -> Sequence[NodeView]:
        decision = choose(
            Question(
                self._registry.views(session.model),
                self._registry.now_ms,
                secrets.SystemRandom().random(),
                prompt_tokens=session.prompt_tokens,
                completion_tokens=request.wanted_tokens or EXPECTED_COMPLETION_TOKENS,
                context_min=session.prompt_tokens + 1,
                preferences=_preferences(request),
            )
        )
        session.decision = decision
        if not decision.candidates:
            raise Refusal(
                503,
                "no_node_available",
                f"no healthy node serves {session.model} on these terms just now",
                retry_after_s=NODES_RETRY_AFTER_S,
            )
        return decision.candidates

    async def _authorise(
        self, session: Session, request: ChatRequest, candidates: Sequence[NodeView], context: int
    ) -> None:
        """Set the worst case aside, or as much of it as the balance affords, and bound the answer by it."""
        price_in = max(node.price_in for node in candidates)
        price_out = max(node.price_out for node in candidates)
        room = context - session.prompt_tokens
        wanted = min(request.wanted_tokens or room, room)

        def bound(tokens: int) -> Nano:
            return hold_for(
                prompt_tokens=session.prompt_tokens, max_tokens=tokens, choices=request.choices,
                price_in=price_in, price_out=price_out,
            )  # fmt: skip

        try:
            session.hold = await self._keeper.authorise(session.buyer, bound(wanted), minimum=bound(1))
        except InsufficientFunds as e:
            raise Refusal(
                402, "insufficient_funds",
                f"your available balance is ${dollars(Nano(e.available_nano))}, this request needs at least "
                f"${dollars(bound(1))}; add funds",
            ) from e  # fmt: skip
        session.max_tokens = min(
            wanted,
            affordable_tokens(
                available=session.hold.amount, prompt_tokens=session.prompt_tokens, choices=request.choices,
                price_in=price_in, price_out=price_out,
            ),
        )  # fmt: skip
        if session.max_tokens < wanted:
            session.clamped_from = wanted

    # ---- serving

    async def _relay(
        self,
        responder: Responder,
        session: Session,
        request: ChatRequest,
        candidates: Sequence[NodeView],
        counter: TokenCounter,
    ) -> None:
        assert session.person_id is not None
        body = engine_body(
            request, max_tokens=session.max_tokens, cache_salt=self._cache_salt(session.person_id)
        )
        failure: RequestBroken | None = None
        for node in candidates:
            session.node = node
            session.answer = Answer(
                request_id=f"chatcmpl-{session.request_id.hex}",
                model=session.model,
                created_s=int(self._clock.now().timestamp()),
            )
            try:
                await self._relay_from(node, responder, session, request, body)
            except RequestBroken as e:
                _log.info(
                    "request %s: node %s failed: %s", session.request_id, node.node_id, type(e).__name__
                )
                failure = e
                if session.answer.has_begun:
                    await self._settle_broken(responder, session, counter)
                    return
                if not e.is_retriable:
                    raise Refusal(
                        400, "refused_by_engine", "the engine refuses this request's parameters"
                    ) from e
                continue
            except FabricUnavailable as e:
                raise Refusal(
                    503, "fabric_unavailable", "no connection to the nodes just now; try again",
                    retry_after_s=NODES_RETRY_AFTER_S,
                ) from e  # fmt: skip
            except BuyerGone:
                await self._settle(session, counter, status=BUYER_LEFT)
                raise
            await self._finish(responder, session, request, counter)
            return
        session.node = None
        raise Refusal(
            503, "nodes_failed", "every node tried failed before its first token; try again",
            retry_after_s=NODES_RETRY_AFTER_S,
        ) from failure  # fmt: skip

    async def _relay_from(
        self, node: NodeView, responder: Responder, session: Session, request: ChatRequest, body: bytes
    ) -> None:
        """Relay one node's answer up to (not with) its last part; RequestBroken or BuyerGone otherwise."""
        assert session.answer is not None
        answer = session.answer
        message = Request(
            v=VERSION, id=session.request_id.hex, model=session.model, body=body, stream=session.is_stream,
            deadline_ms=WALL_MS_MAX,
        )  # fmt: skip
        outcome, sent_at = Outcome.NEUTRAL, self._clock.monotonic()
        self._registry.begin(node.node_id, session.model)
        try:
            async with self._nodes.request(node.node_id, message) as reply:
                responder.when_gone(reply.cancel)
                while frames := await reply.batch():
                    out = b"".join(self._take(frame, responder, session, request) for frame in frames)
                    if out:
                        await responder.send(out)
            if responder.is_gone:
                raise BuyerGone
            if not answer.is_complete:
                raise ProtocolBroken("the answer ended without its end")
            outcome = Outcome.SUCCEEDED
        except RequestBroken as e:
            outcome = Outcome.FAILED if e.blames_node else Outcome.NEUTRAL
            raise
        finally:
            responder.when_gone(None)
            first = session.first_delta
            first_token_ms = None if first is None else int((first - sent_at) * 1000)
            self._registry.finish(node.node_id, session.model, outcome, first_token_ms=first_token_ms)

    def _take(
        self, frame: AnswerFrame, responder: Responder, session: Session, request: ChatRequest
    ) -> bytes:
        """Note a frame; give what of it the buyer may see now."""
        answer = session.answer
        assert answer is not None
        if isinstance(frame, End):
            answer.finish(frame)
        if not isinstance(frame, Delta):
            return b""
        if session.first_delta is None:
            session.first_delta = self._clock.monotonic()
        is_first = not answer.has_begun
        answer.take(frame)
        if not session.is_stream:
            return b""
        if is_first:
            responder.begin(200, self._headers(session))
        if answer.finished < request.choices:
            return answer.chunk(frame)
        session.held_back.append(frame)  # every choice has ended: the rest waits for the commit
        return b""

    # ---- the bill

    async def _count(self, session: Session, counter: TokenCounter) -> Usage:
        assert session.answer is not None
        answer = session.answer
        written = answer.written()

        def count() -> int:
            total = 0
            for ids, text, has_all_ids, is_cut in written:
                if has_all_ids and counter.say_the_same(ids, text, is_cut_at_stop=is_cut):
                    total += len(ids)
                else:
                    total += counter.text_tokens(text)
            return total

        is_big = sum(len(text) for _, text, _, _ in written) > BIG_TEXT_CHARACTERS
        counted = await asyncio.to_thread(count) if is_big else count()
        return settle(
            prompt_counted=session.prompt_tokens,
            prompt_reported=answer.prompt_reported,
            completion_counted=counted,
            completion_reported=answer.completion_reported,
        )

    async def _settle(self, session: Session, counter: TokenCounter, *, status: int) -> UsageOut:
        """Count, price and post; returns once the charge is durable."""
        assert session.node is not None
        assert session.answer is not None
        usage = await self._count(session, counter)
        node = session.node
        amount = cost(
            tokens_in=usage.tokens_in, tokens_out=usage.tokens_out,
            price_in=node.price_in, price_out=node.price_out,
        )  # fmt: skip
        if session.hold is not None:
            amount = min(
                amount, session.hold.amount
            )  # V2: a node that overruns its limit earns nothing by it
        if usage.is_drifting:
            metrics.DRIFT.inc()
            _log.warning("request %s: node %s counts otherwise than we do", session.request_id, node.node_id)
        _, platform = split(amount)
        await self._post(
            Charge(
                id=session.request_id,
                buyer=session.buyer,
                amount=amount,
                fee=platform,
                operator=await self._accounts.operator(UUID(node.operator_id)),
                node=node_uuid(node.node_id),
                model=session.model,
                key_id=session.key_id,
                tok_in=usage.tokens_in,
                tok_out=usage.tokens_out,
                counted_by=usage.counted_by,
                price_version=node.price_version,
                latency_ms=self._elapsed_ms(session, self._clock.monotonic()),
                ttft_ms=None
                if session.first_delta is None
                else self._elapsed_ms(session, session.first_delta),
                status=status,
                finish=session.answer.finish_reason,
                stream=session.is_stream,
            ),
            hold=session.hold if amount != ZERO else None,
        )
        return UsageOut(
            prompt_tokens=usage.tokens_in,
            completion_tokens=usage.tokens_out,
            total_tokens=usage.tokens_in + usage.tokens_out,
            cost=dollars(amount),
            cost_nano=amount.n,
            receipt_id=str(session.request_id),
            counted_by=usage.counted_by.name.lower(),
        )

    async def _post(self, charge: Charge, *, hold: Hold | None) -> None:
        """Post to the end even if this request's task is cancelled meanwhile."""
        await asyncio.shield(asyncio.ensure_future(self._poster.post(charge, hold)))
        metrics.REQUESTS.labels(status=str(charge.status)).inc()
        metrics.TOKENS.labels(direction="in").inc(charge.tok_in)
        metrics.TOKENS.labels(direction="out").inc(charge.tok_out)
        metrics.CHARGED_NANO.inc(charge.amount.n)

    def _elapsed_ms(self, session: Session, until: float) -> int:
        return int((until - session.started) * 1000)

    async def _finish(
        self, responder: Responder, session: Session, request: ChatRequest, counter: TokenCounter
    ) -> None:
        assert session.answer is not None
        assert session.node is not None
        answer = session.answer
        usage = await self._settle(session, counter, status=200)
        if not session.is_stream:
            headers = [*self._headers(session), (b"x-tollway-cost", usage.cost.encode())]
            responder.answer(200, headers, answer.completion(usage))
            return
        if not answer.has_begun:  # an answer without a single token
            responder.begin(200, self._headers(session))
        last = len(session.held_back) - 1
        parts = [
            answer.chunk(frame, None if request.wants_usage or at < last else usage)
            for at, frame in enumerate(session.held_back)
        ]
        if request.wants_usage or last < 0:
            parts.append(answer.usage_event(usage))
        responder.end(b"".join(parts) + DONE)

    async def _settle_broken(self, responder: Responder, session: Session, counter: TokenCounter) -> None:
        """A node that died in mid-answer: what was delivered is billed, and the buyer is told."""
        await self._settle(session, counter, status=502)
        refusal = Refusal(502, "node_failed", "the node failed in mid-answer; you pay for what was delivered")
        if session.is_stream:
            responder.end(error_event(refusal.body()))
        else:
            responder.answer(502, self._headers(session), encode(refusal.body()))

    async def _record_failure(self, session: Session, status: int, code: str) -> None:
        """Every request of a known buyer has a usage row (R17), refused ones at a cost of zero."""
        if not session.buyer or status == 429:  # a flood must not fill the ledger
            return
        node = session.node
        charge = Charge(
            id=session.request_id,
            buyer=session.buyer,
            operator=None if node is None else await self._accounts.operator(UUID(node.operator_id)),
            node=None if node is None else node_uuid(node.node_id),
            model=session.model,
            key_id=session.key_id,
            latency_ms=self._elapsed_ms(session, self._clock.monotonic()),
            status=status,
            finish=code[:40],
            stream=session.is_stream,
        )
        with contextlib.suppress(LedgerError):  # the refusal stands, recorded or not
            await self._post(charge, hold=None)

    # ---- headers

    def _headers(self, session: Session) -> list[tuple[bytes, bytes]]:
        headers = [] if session.taken is None else session.taken.headers()
        headers.append((b"x-tollway-request-id", str(session.request_id).encode()))
        node = session.node
        if node is not None:
            headers += [
                (b"x-tollway-node", node.node_id.encode()),
                (b"x-tollway-price-in", dollars(Nano(node.price_in)).encode()),
                (b"x-tollway-price-out", dollars(Nano(node.price_out)).encode()),
            ]
        if node is not None and session.decision is not None:
            headers.append((b"x-tollway-route", summary(session.decision, node.node_id).encode()))
        if session.clamped_from is not None:
            clamped = f"{session.max_tokens}; wanted={session.clamped_from}"
            headers.append((b"x-tollway-max-tokens", clamped.encode()))
        return headers

    def _refusal_headers(self, session: Session, refusal: Refusal) -> Headers:
        headers = self._headers(session)
        is_told = session.taken is not None and not session.taken.allowed
        if refusal.retry_after_s is not None and not is_told:
            headers.append((b"retry-after", str(refusal.retry_after_s).encode()))
        return headers

    def _cache_salt(self, person_id: UUID) -> str:
        return hmac.new(self._secret, b"cache-salt" + person_id.bytes, hashlib.sha256).hexdigest()[:32]


def _preferences(request: ChatRequest) -> Preferences:
    wish = request.provider
    if wish is None:
        return NO_PREFERENCES
    return Preferences(
        price_in_max=wish.max_price_in,
        price_out_max=wish.max_price_out,
        only=frozenset(wish.only or ()),
        ignore=frozenset(wish.ignore or ()),
        order=tuple(wish.order or ()),
        sort=Sort.BALANCED if wish.sort is None else Sort(wish.sort),
        allow_fallbacks=wish.allow_fallbacks,
    )
