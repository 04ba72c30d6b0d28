"""Serving one chat or text completion, from key to last byte.

key → limits → parse and bound → choose nodes → authorise from the lease → relay → count → post the charge
→ last byte.  The law:

* nothing leaves for a node before its worst-case cost is covered by a lease in the database (V1);
* another node may take over only while the buyer has seen nothing (at most two retries, same hold, same
  price ceiling); whoever does not stream has seen nothing until the end, and pays for no broken attempt;
* of an alias, the next model takes over where one cannot serve or its nodes failed, with a hold of its own
  in place of the first; the retries are two over all models, and the last is kept for the next model;
* the last byte waits for the commit of the charge, so bytes delivered mean a usage row (V6);
* every node that was sent the prompt is on record with the request, also where it did not answer;
* a buyer who leaves pays for what had come by then, and the node is told to stop;
* prompts and completions are never logged, nor is the text of any error that might quote them.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import logging
import secrets
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Final
from uuid import UUID

from msgspec.structs import replace

from marketplace.accounts.errors import KeysUnavailable
from marketplace.fabric.errors import (
    FabricUnavailable,
    NodeAbsent,
    NodeFailed,
    ProtocolBroken,
    RequestBroken,
)
from marketplace.fabric.node_client import AnswerFrame, NodeClient
from marketplace.gateway import metrics
from marketplace.gateway.admission import Admission, Reserved, may_use
from marketplace.gateway.answer import DONE, Answer, ChoiceUnknown, encode, error_event
from marketplace.gateway.answer_shapes import UsageOut
from marketplace.gateway.billing import BIG_TEXT_BYTES, Billing
from marketplace.gateway.completions import PATH as COMPLETIONS_PATH
from marketplace.gateway.completions import CompletionAnswer, parse_completion
from marketplace.gateway.idempotency import HEADER, Held, Idempotency
from marketplace.gateway.ports import KeyFacts, Keys, LedgerAccounts, ModelFacts, Shelf
from marketplace.gateway.quote import Quote, quote_for
from marketplace.gateway.receipts_writer import ReceiptWriter
from marketplace.gateway.requests import InferenceRequest, engine_body, parse_chat
from marketplace.gateway.responder import BuyerGone, Headers, Responder
from marketplace.gateway.session import Session
from marketplace.ledger.errors import InsufficientFunds, KeyReused, LedgerError, LedgerFault, UnknownResult
from marketplace.ledger.lease_keeper import LeaseKeeper
from marketplace.ledger.money import Nano, dollars
from marketplace.ledger.poster import Poster
from marketplace.metering.counting import PromptRefused, TokenCounter
from marketplace.metering.settlement import affordable_tokens, hold_for
from marketplace.platform.allotments import Allotments
from marketplace.platform.clock import Clock
from marketplace.platform.http import Refusal
from marketplace.platform.ids import uuid7
from marketplace.platform.limits import Rule, SharedLimits, client_address
from marketplace.routing.affinity import Affinity
from marketplace.routing.choice import (
    NO_PREFERENCES,
    RETRIES_MAX,
    NodeView,
    Preferences,
    Question,
    Sort,
    choose,
    summary,
)
from marketplace.routing.registry import Outcome, Registry
from marketplace.routing.replay import DecisionLog
from node_agent.protocol import VERSION, WALL_MS_MAX, Delta, End, FailureCode, Request

_log = logging.getLogger(__name__)
_chance = secrets.SystemRandom()

PATH: Final = b"/v1/chat/completions"
NODES_RETRY_AFTER_S: Final = 5
LEDGER_RETRY_AFTER_S: Final = 2
EXPECTED_COMPLETION_TOKENS: Final = 256
"""Where the buyer names no limit: in which proportion a node's two prices matter."""
BUYER_LEFT: Final = 499
"""Status of a usage row whose buyer closed the connection; nginx' number for it."""
ENGINE_WORDS_MAX: Final = 300
DRAIN_S_MAX: Final = 10
SPEED_TOKENS_MIN: Final = 16


class CannotServeNow(Refusal):
    """This model cannot take this request just now; an alias's next one may."""


class ChatService:
    """Serves `POST /v1/chat/completions` and `/v1/completions` for one gateway process."""

    def __init__(
        self,
        *,
        keys: Keys,
        limits: SharedLimits,
        allotments: Allotments,
        shelf: Shelf[TokenCounter],
        registry: Registry,
        nodes: NodeClient,
        keeper: LeaseKeeper,
        poster: Poster,
        receipts: ReceiptWriter,
        idempotency: Idempotency,
        accounts: LedgerAccounts,
        clock: Clock,
        secret: bytes,
        trusted_proxies: frozenset[str] = frozenset(),
        decisions: DecisionLog | None = None,
    ) -> None:
        self._keys = keys
        self._limits = limits
        self._admission = Admission(limits, allotments)
        self._shelf = shelf
        self._registry = registry
        self._nodes = nodes
        self._keeper = keeper
        self._accounts = accounts
        self._clock = clock
        self._idempotency = idempotency
        self._secret = secret
        self._trusted_proxies = trusted_proxies
        self._decisions = decisions
        self._affinity = Affinity()
        self._billing = Billing(
            poster=poster, keeper=keeper, receipts=receipts, accounts=accounts, clock=clock
        )
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def close(self) -> None:
        """Let what is being served end, and post what it costs; before the poster and the keeper close."""
        try:
            await asyncio.wait_for(self._idle.wait(), DRAIN_S_MAX)
        except TimeoutError:
            _log.warning("%d requests did not end", self._in_flight)
        await self._billing.close()

    async def serve(self, responder: Responder) -> None:
        """Answer one request; every way out has an answer in OpenAI's shape."""
        session = Session(uuid7(), self._clock.monotonic())
        held = Held(responder) if HEADER in responder.headers else None
        self._in_flight += 1
        self._idle.clear()
        metrics.IN_FLIGHT.inc()
        try:
            try:
                await self._serve_guarded(held or responder, session)
            finally:
                if held is not None:
                    await self._idempotency.finish(held, session)
        finally:
            if session.hold is not None:
                self._keeper.release(session.hold)
            if session.reserved is not None:
                self._leave(session, session.reserved)
            metrics.IN_FLIGHT.dec()
            metrics.requests(session.status).inc()
            metrics.SECONDS.observe(self._clock.monotonic() - session.started)
            self._in_flight -= 1
            if not self._in_flight:
                self._idle.set()

    def _leave(self, session: Session, reserved: Reserved) -> None:
        """Give back what the request did not use of its limits; all of it, unless a charge was begun."""
        usage = session.usage
        if usage is not None:
            self._admission.leave(reserved, tokens=usage.total_tokens, nano=usage.cost_nano)
        elif session.is_charged:
            self._admission.leave(reserved, tokens=None, nano=None)
        else:
            self._admission.leave(reserved, tokens=0, nano=0)

    async def _settle(self, session: Session, *, status: int) -> UsageOut:
        session.is_charged = True
        session.usage = await self._billing.settle(session, status=status)
        return session.usage

    async def _serve_guarded(self, responder: Responder, session: Session) -> None:
        try:
            await self._serve(responder, session)
        except Refusal as refusal:
            await self._billing.record_refusal(session, status=refusal.status, code=refusal.code)
            self._refuse(responder, session, refusal)
        except BuyerGone:
            session.status = BUYER_LEFT
            await self._billing.record_refusal(session, status=BUYER_LEFT, code="buyer_left")
        except UnknownResult:
            self._refuse(responder, session, _unconfirmed(session))
        except KeyReused:
            session.is_overtaken = True
            self._refuse(responder, session, Refusal(
                409, "idempotency_overtaken",
                "this gateway was held up, and another served and charged this request meanwhile; "
                "ask again with the same Idempotency-Key for its answer",
                retry_after_s=1,
            ))  # fmt: skip
        except (LedgerFault, KeysUnavailable) as e:
            _log.warning("billing is unavailable: %s", type(e).__name__, extra=session.log_fields)
            self._refuse(responder, session, Refusal(
                503, "ledger_unavailable", "billing is briefly unavailable; try again",
                retry_after_s=LEDGER_RETRY_AFTER_S,
            ))  # fmt: skip
        except asyncio.CancelledError:
            await self._stopped(responder, session)
            raise
        except Exception as e:  # the last line of defence: no buyer is left without an answer
            _log.error("a request failed", exc_info=_without_text(e), extra=session.log_fields)
            self._refuse(responder, session, Refusal(500, "internal_error", "an error of ours; it is logged"))

    def _refuse(self, responder: Responder, session: Session, refusal: Refusal) -> None:
        """Refuse, whether or not the stream has begun."""
        session.status = refusal.status
        if session.has_streamed:
            responder.end(error_event(refusal.body()))
        else:
            responder.answer(refusal.status, self._refusal_headers(session, refusal), encode(refusal.body()))

    async def _stopped(self, responder: Responder, session: Session) -> None:
        """This gateway is stopping and has no time left: bill what was delivered, and say so."""
        refusal = Refusal(503, "gateway_stopping", "this gateway is stopping; try again", retry_after_s=1)
        if session.is_charged and not session.has_streamed:
            refusal = _unconfirmed(session)  # who tried again would pay twice
        with contextlib.suppress(LedgerError):  # it is logged, and tried again as far as it can be
            if session.has_streamed and not session.is_recorded:
                await self._settle(session, status=refusal.status)
            else:
                await self._billing.record_refusal(session, status=refusal.status, code=refusal.code)
        self._refuse(responder, session, refusal)

    # ---- admission

    async def _serve(self, responder: Responder, session: Session) -> None:
        key = session.key = await self._authenticate(responder, session)
        session.key_id, session.person_id = key.key_id, key.person_id
        session.taken, session.reserved = await self._admission.enter(key, is_counted=responder.is_counted)
        if session.taken is not None and not session.taken.allowed:
            raise session.taken.refusal()
        session.buyer = await self._accounts.buyer(key.person_id)
        body = await responder.read_body()
        session.request_sha256 = hashlib.sha256(body).digest()
        if isinstance(responder, Held) and await self._idempotency.begin(responder, session):
            return
        is_chat = responder.path != COMPLETIONS_PATH
        request = session.request = parse_chat(body) if is_chat else parse_completion(body)
        session.model = request.model
        session.beginning = self._affinity.beginning(key.person_id, request.model, body)
        if not self._billing.is_ready:
            raise Refusal(
                503, "ledger_unavailable", "billing is briefly unavailable; try again",
                retry_after_s=LEDGER_RETRY_AFTER_S,
            )  # fmt: skip
        is_big = len(body) > BIG_TEXT_BYTES
        *others, last = self._models(session, request)
        for model in others:
            try:
                await self._serve_with(model, responder, session, request, is_big=is_big, is_last=False)
            except CannotServeNow as e:
                if not self._tries_left(session, request):
                    raise
                _log.info("an alias falls back: %s", e.code, extra=session.log_fields)
            else:
                return
        await self._serve_with(last, responder, session, request, is_big=is_big, is_last=True)

    async def _serve_with(
        self, model: ModelFacts, responder: Responder, session: Session, request: InferenceRequest, *,
        is_big: bool, is_last: bool,
    ) -> None:  # fmt: skip
        """Serve with this model; CannotServeNow, with nothing held any more, where another may be tried."""
        candidates = await self._place_on(model, session, request, is_big=is_big)
        tries = self._tries_left(session, request)
        candidates = candidates[: tries if is_last else max(1, tries - 1)]
        await self._authorise(session, request, candidates, model.context)
        if not session.tries:
            metrics.ADMISSION_SECONDS.observe(self._clock.monotonic() - session.started)
        try:
            await self._relay(responder, session, request, candidates)
        except CannotServeNow:
            if session.hold is not None:
                self._keeper.release(session.hold)
                session.hold = None
            if session.reserved is not None:
                self._admission.take_back(session.reserved)
            raise

    def _tries_left(self, session: Session, request: InferenceRequest) -> int:
        """How many more nodes may be asked, whichever the model."""
        wish = request.provider
        if session.tries and wish is not None and not wish.allow_fallbacks:
            return 0
        return 1 + RETRIES_MAX - session.tries

    async def _authenticate(self, responder: Responder, session: Session) -> KeyFacts:
        try:
            return await self._key(responder)
        except Refusal:
            if responder.is_counted:
                raise
            forwarded = responder.headers.get(b"x-forwarded-for", b"").decode("latin-1") or None
            address = client_address(responder.peer, forwarded, self._trusted_proxies)
            session.taken = self._limits.take(Rule.UNAUTHENTICATED, address)
            if not session.taken.allowed:
                raise session.taken.refusal() from None
            raise

    async def _key(self, responder: Responder) -> KeyFacts:
        """Give what the presented key may do; Refusal 401, or 503 when keys cannot be checked."""
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
            why = "this API key does not work: it is mistyped, unknown or revoked"
            if text.startswith("st-"):
                why = "this is a session's token, which cannot chat: make a key with POST /api/keys"
            raise Refusal(401, "invalid_api_key", why)
        if "inference" not in found.scopes:
            raise Refusal(403, "missing_scope", "this key lacks the scope 'inference'")
        return found

    async def _place(
        self, session: Session, request: InferenceRequest, *, is_big: bool
    ) -> tuple[ModelFacts, Sequence[NodeView]]:
        """Find the model and the nodes to ask: of an alias, the first model that can be served just now."""
        *others, last = self._models(session, request)
        for model in others:
            with contextlib.suppress(CannotServeNow):
                return model, await self._place_on(model, session, request, is_big=is_big)
        return last, await self._place_on(last, session, request, is_big=is_big)

    def _models(self, session: Session, request: InferenceRequest) -> Sequence[ModelFacts]:
        named = self._shelf.resolve(request.model)
        if not named:
            raise Refusal(404, "model_not_found", f"no model is named {request.model!r}", param="model")
        key = session.key
        allowed = [
            model for model in named
            if key is None or may_use(key, model.name) or may_use(key, request.model)
        ]  # fmt: skip
        if not allowed:
            raise Refusal(403, "model_not_allowed", f"this key may not use {request.model}", param="model")
        return allowed

    async def _place_on(
        self, model: ModelFacts, session: Session, request: InferenceRequest, *, is_big: bool
    ) -> Sequence[NodeView]:
        session.model = model.name
        session.counter = await self._counter(model)
        request.disarm(session.counter)
        counts = await self._count_prompts(session, session.counter, request, is_big=is_big)
        session.prompt_tokens, session.prompt_longest = sum(counts), max(counts)
        _check_context(session, request, model)
        return self._choose(session, request)

    async def _counter(self, model: ModelFacts) -> TokenCounter:
        try:
            return await self._shelf.counter_of(model.name)
        except Exception as e:
            _log.error("the tokenizer of %s cannot be loaded", model.name, exc_info=_without_text(e))
            raise CannotServeNow(
                503, "model_unavailable", f"{model.name} cannot be served just now",
                retry_after_s=NODES_RETRY_AFTER_S,
            ) from e  # fmt: skip

    async def _count_prompts(
        self, session: Session, counter: TokenCounter, request: InferenceRequest, *, is_big: bool
    ) -> list[int]:
        owner = b"" if session.person_id is None else session.person_id.bytes
        try:
            if is_big:
                return await asyncio.to_thread(request.prompt_counts, counter, owner)
            return request.prompt_counts(counter, owner)
        except PromptRefused as e:
            raise Refusal(400, "invalid_messages", str(e), param=request.prompt_field) from e

    def _choose(self, session: Session, request: InferenceRequest) -> Sequence[NodeView]:
        preferences = _preferences(request)
        has_wishes = preferences is not NO_PREFERENCES
        views = self._registry.views if has_wishes else self._registry.best_views
        question = Question(
            views(session.model),
            self._registry.now_ms,
            _chance.random(),
            prompt_tokens=session.prompt_tokens,
            completion_tokens=request.wanted_tokens or EXPECTED_COMPLETION_TOKENS,
            context_min=session.prompt_longest + (request.wanted_tokens or 1),
            preferences=preferences,
            warm=self._affinity.warm(session.beginning, session.started),
        )
        decision = choose(question)
        if not decision.candidates and not has_wishes:
            question = replace(question, views=self._registry.views(session.model))
            decision = choose(question)
        session.decision = decision
        if self._decisions is not None:
            self._decisions.note(question, decision.candidates)
        self._registry.tally.note(decision)
        if not decision.candidates:
            raise CannotServeNow(
                503,
                "no_node_available",
                f"no healthy node serves {session.model} on these terms just now",
                retry_after_s=NODES_RETRY_AFTER_S,
            )
        return decision.candidates

    async def _authorise(
        self, session: Session, request: InferenceRequest, candidates: Sequence[NodeView], context: int
    ) -> None:
        """Set the worst case aside, or as much of it as the balance affords, and bound the answer by it.

        The worst case is every permitted token at the highest price among the candidates, whichever of
        them answers in the end.
        """
        price_in = max(node.price_in for node in candidates)
        price_out = max(node.price_out for node in candidates)
        room = min(context, *(node.context for node in candidates)) - session.prompt_longest
        wanted = asked = request.wanted_tokens or room
        least = min(wanted, max(1, request.min_tokens or 1))

        def bound(tokens: int) -> Nano:
            return hold_for(
                prompt_tokens=session.prompt_tokens, max_tokens=tokens, choices=request.choices,
                price_in=price_in, price_out=price_out,
            )  # fmt: skip

        def affordable(amount: Nano) -> int:
            return affordable_tokens(
                available=amount, prompt_tokens=session.prompt_tokens, choices=request.choices,
                price_in=price_in, price_out=price_out,
            )  # fmt: skip

        if session.reserved is not None and session.key is not None:
            wanted = await self._admission.tokens(
                session.key, session.reserved, prompt=session.prompt_tokens, wanted=wanted, least=least,
                choices=request.choices, is_named=request.wanted_tokens is not None,
            )  # fmt: skip
            budget = await self._admission.spend(
                session.key, session.reserved, most=bound(wanted), least=bound(least)
            )
            wanted = min(wanted, affordable(budget))
        try:
            session.hold = await self._keeper.authorise(session.buyer, bound(wanted), minimum=bound(least))
        except InsufficientFunds as e:
            raise Refusal(
                402, "insufficient_funds",
                f"your available balance is ${dollars(Nano(e.available_nano))}, this request needs at least "
                f"${dollars(bound(least))}; add funds",
            ) from e  # fmt: skip
        session.max_tokens = min(wanted, affordable(session.hold.amount))
        session.clamped_from = asked if session.max_tokens < asked else None

    async def quote(self, person_id: UUID, body: bytes, *, is_chat: bool) -> Quote:
        """Price a request without serving it: admission up to the hold, and no hold."""
        session = Session(uuid7(), self._clock.monotonic(), person_id=person_id)
        request = session.request = parse_chat(body) if is_chat else parse_completion(body)
        model, candidates = await self._place(session, request, is_big=len(body) > BIG_TEXT_BYTES)
        return quote_for(session, request, candidates, context=model.context)

    # ---- serving

    async def _relay(
        self,
        responder: Responder,
        session: Session,
        request: InferenceRequest,
        candidates: Sequence[NodeView],
    ) -> None:
        assert session.person_id is not None
        body = engine_body(
            request, max_tokens=session.max_tokens, cache_salt=_cache_salt(self._secret, session.person_id)
        )
        failure: RequestBroken | None = None
        for node in candidates:
            session.node, session.first_delta = node, None
            session.tries += 1
            answer_kind = Answer if request.kind == "chat" else CompletionAnswer
            session.answer = answer_kind(
                request_id=f"{answer_kind.ID_START}{session.request_id.hex}",
                model=session.model,
                created_s=int(self._clock.now().timestamp()),
                choices=request.choices,
            )
            try:
                await self._relay_from(node, responder, session, body)
            except RequestBroken as e:
                failure = e
                _log.info("a node failed a request: %s", type(e).__name__, extra=session.log_fields)
                if not session.answer.is_whole:  # else only the node's last word is missing
                    if not isinstance(e, NodeAbsent):
                        self._billing.record_attempt(session, e.reason)
                    if session.has_streamed:
                        await self._end_broken(responder, session)
                        return
                    _raise_if_request_is_bad(e)
                    continue
            except FabricUnavailable as e:
                raise Refusal(
                    503, "fabric_unavailable", "no connection to the nodes just now; try again",
                    retry_after_s=NODES_RETRY_AFTER_S,
                ) from e  # fmt: skip
            except BuyerGone:
                if session.answer.has_begun:
                    await self._settle(session, status=BUYER_LEFT)
                raise
            await self._finish(responder, session, request)
            return
        session.node = None
        raise CannotServeNow(
            503, "nodes_failed", "every node tried failed before it answered; try again",
            retry_after_s=NODES_RETRY_AFTER_S,
        ) from failure  # fmt: skip

    async def _relay_from(self, node: NodeView, responder: Responder, session: Session, body: bytes) -> None:
        """Relay one node's answer up to (not with) its last part; RequestBroken or BuyerGone otherwise."""
        answer, request = session.answer, session.request
        assert answer is not None
        assert request is not None
        left_ms = WALL_MS_MAX - int((self._clock.monotonic() - session.started) * 1000)
        if responder.is_gone:
            raise BuyerGone
        message = Request(
            v=VERSION, id=session.request_id.hex, model=session.model, body=body, stream=session.is_stream,
            deadline_ms=max(1, left_ms), kind=request.kind,
            frame_gap_ms=self._nodes.frame_gap_ms if session.is_stream else 0,
        )  # fmt: skip
        outcome, sent_at = Outcome.NEUTRAL, self._clock.monotonic()
        self._registry.begin(node.node_id, session.model)
        try:
            async with self._nodes.request(node.node_id, message) as reply:
                responder.when_gone(reply.cancel)
                if session.is_stream:
                    reply.pass_on(partial(_pass_on, answer, responder))
                while frames := await reply.batch():
                    out = b"".join([self._take(frame, responder, session) for frame in frames])
                    if out:
                        await responder.send(out)
            if responder.is_gone:
                raise BuyerGone
            if not answer.is_whole:
                raise ProtocolBroken("the answer ended before its end")
            outcome = Outcome.SUCCEEDED
            self._affinity.answered(session.beginning, node.node_id, session.started)
        except RequestBroken as e:
            outcome = Outcome.FAILED if e.blames_node else Outcome.NEUTRAL
            raise
        finally:
            responder.when_gone(None)
            first = session.first_delta if session.is_stream else None  # else the node gathers all of it
            self._registry.finish(
                node.node_id, session.model, outcome,
                first_token_ms=None if first is None else int((first - sent_at) * 1000),
                tokens_per_s=None if first is None else self._speed(answer, first),
            )  # fmt: skip

    def _speed(self, answer: Answer, first: float) -> int | None:
        """Tokens per second after the first, None where there are too few to tell."""
        tokens, seconds = answer.tokens_told, self._clock.monotonic() - first
        return int(tokens / seconds) if tokens >= SPEED_TOKENS_MIN and seconds > 0 else None

    def _take(self, frame: AnswerFrame, responder: Responder, session: Session) -> bytes:
        """Note a frame; give what of it the buyer may see now."""
        answer = session.answer
        assert answer is not None
        if isinstance(frame, End):
            answer.finish(frame)
        if not isinstance(frame, Delta):
            return b""
        try:
            answer.take(frame)
        except ChoiceUnknown as e:
            raise ProtocolBroken("a choice nobody asked for") from e
        if not frame.choices:
            return b""
        if session.first_delta is None:
            session.first_delta = self._clock.monotonic()
        if not session.is_stream:
            return b""
        if not session.has_streamed:
            session.has_streamed = True
            responder.begin(200, self._headers(session))
        if not answer.is_whole:
            return answer.chunk(frame)
        session.held_back.append(frame)  # every choice has ended: the rest waits for the commit
        return b""

    async def _finish(self, responder: Responder, session: Session, request: InferenceRequest) -> None:
        assert session.answer is not None
        answer = session.answer
        began = self._clock.monotonic()
        usage = await self._settle(session, status=200)
        metrics.CHARGE_SECONDS.observe(self._clock.monotonic() - began)
        if not session.is_stream:
            headers = [*self._headers(session), (b"x-tollway-cost", usage.cost.encode())]
            responder.answer(200, headers, answer.completion(usage))
            return
        *earlier, last = session.held_back
        parts = [answer.chunk(frame) for frame in earlier]
        parts.append(answer.chunk(last, None if request.wants_usage else usage))
        if request.wants_usage:
            parts.append(answer.usage_event(usage))
        responder.end(b"".join(parts) + DONE)

    async def _end_broken(self, responder: Responder, session: Session) -> None:
        """A node that died in mid-stream: what was delivered is billed, and the buyer is told."""
        await self._settle(session, status=502)
        refusal = Refusal(502, "node_failed", "the node failed in mid-answer; you pay for what was delivered")
        responder.end(error_event(refusal.body()))

    # ---- headers

    def _headers(self, session: Session) -> list[tuple[bytes, bytes]]:
        headers = [] if session.taken is None else session.taken.headers()
        headers.append((b"x-tollway-request-id", str(session.request_id).encode()))
        node = session.node
        if node is not None:
            headers += [
                (b"x-tollway-node", node.node_id.encode()),
                (b"x-tollway-price-in", _price(node.price_in)),
                (b"x-tollway-price-out", _price(node.price_out)),
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


def _pass_on(answer: Answer, responder: Responder, frame: Delta) -> bool:
    """Send a stream's ordinary part where it arrives; False where there is more to do than that."""
    if not responder.is_clear:  # not begun, or a slow reader: that is for who can wait
        return False
    events = answer.take_plain(frame)
    if not events:
        return False
    responder.send_now(events)
    return True


@lru_cache(maxsize=10_000)
def _price(nano: int) -> bytes:
    """A price in dollars per million tokens, as a header has it."""
    return dollars(Nano(nano)).encode()


@lru_cache(maxsize=10_000)
def _cache_salt(secret: bytes, person_id: UUID) -> str:
    return hmac.new(secret, b"cache-salt" + person_id.bytes, hashlib.sha256).hexdigest()[:32]


def _check_context(session: Session, request: InferenceRequest, model: ModelFacts) -> None:
    """Refuse what does not fit the model's context (A66)."""
    prompt = session.prompt_longest
    if prompt + (request.wanted_tokens or 1) > model.context:
        wanted = "" if request.wanted_tokens is None else f" and {request.wanted_tokens} are asked for"
        raise CannotServeNow(
            400, "context_length_exceeded",
            f"the prompt has {prompt} tokens{wanted}; {model.name} takes {model.context} in all",
            param=request.prompt_field if prompt >= model.context else "max_tokens",
        )  # fmt: skip


def _unconfirmed(session: Session) -> Refusal:
    return Refusal(
        503, "charge_unconfirmed",
        f"the answer is complete, but its charge is not confirmed yet; request {session.request_id} "
        "will show in your usage once it is",
    )  # fmt: skip


def _raise_if_request_is_bad(error: RequestBroken) -> None:
    """Refuse with 400 where the engine says that the request is at fault, so that no other would take it."""
    if isinstance(error, NodeFailed) and error.code is FailureCode.BAD_REQUEST and not error.is_retriable:
        words = "".join(c if c.isprintable() else " " for c in error.message)[:ENGINE_WORDS_MAX]
        raise Refusal(400, "refused_by_engine", f"the engine refuses this request: {words}") from error


def _without_text(error: Exception) -> Exception:
    """The same place and kind of error without its text, which might quote a prompt."""
    return RuntimeError(type(error).__name__).with_traceback(error.__traceback__)


def _preferences(request: InferenceRequest) -> Preferences:
    wish = request.provider
    if wish is None:
        return NO_PREFERENCES
    return Preferences(
        price_in_max=wish.max_price_in,
        price_out_max=wish.max_price_out,
        operator=wish.operator,
        only=frozenset(wish.only or ()),
        ignore=frozenset(wish.ignore or ()),
        order=tuple(wish.order or ()),
        sort=Sort.BALANCED if wish.sort is None else Sort(wish.sort),
        allow_fallbacks=wish.allow_fallbacks,
    )
