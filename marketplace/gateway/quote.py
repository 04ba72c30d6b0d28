"""What a request would cost, before it is made: `POST /v1/quote`.  Nothing is held, nothing is charged.

The worst case is exactly the hold admission would set aside; the expected one is the prompt and a usual
answer (EXPECTED_TOKENS, or the buyer's own limit if that is lower) at the price of the node asked first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec
from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from marketplace.gateway.requests import BODY_BYTES_MAX, InferenceRequest
from marketplace.gateway.session import Session
from marketplace.ledger.money import Nano, dollars
from marketplace.metering.settlement import hold_for
from marketplace.platform.http import InferenceIdentity, Refusal, RefusalOut
from marketplace.routing.choice import NodeView

EXPECTED_TOKENS: Final = 256
router: Final = APIRouter()


@dataclass(frozen=True, slots=True)
class Quote:
    """Prices are nano-dollars per million tokens."""

    model: str
    prompt_tokens: int
    max_tokens: int
    """Per choice."""
    choices: int
    worst: Nano
    expected: Nano
    price_in_max: int
    price_out_max: int
    nodes: tuple[NodeView, ...]
    """Whom it would be asked of, in order."""


def quote_for(
    session: Session, request: InferenceRequest, candidates: Sequence[NodeView], *, context: int
) -> Quote:
    """Price an admitted request."""
    first = candidates[0]
    price_in = max(node.price_in for node in candidates)
    price_out = max(node.price_out for node in candidates)
    room = min(context, *(node.context for node in candidates)) - session.prompt_longest
    wanted = request.wanted_tokens or room
    return Quote(
        model=session.model,
        prompt_tokens=session.prompt_tokens,
        max_tokens=wanted,
        choices=request.choices,
        worst=hold_for(
            prompt_tokens=session.prompt_tokens, max_tokens=wanted, choices=request.choices,
            price_in=price_in, price_out=price_out,
        ),
        expected=hold_for(
            prompt_tokens=session.prompt_tokens, max_tokens=min(wanted, EXPECTED_TOKENS),
            choices=request.choices, price_in=first.price_in, price_out=first.price_out,
        ),
        price_in_max=price_in,
        price_out_max=price_out,
        nodes=tuple(candidates),
    )  # fmt: skip


class QuoteOut(BaseModel):
    """Dollars are decimal strings; prices are per million tokens."""

    model: str = Field(description="Which would answer; of an alias, the first that can just now")
    prompt_tokens: int
    max_tokens: int = Field(description="Completion tokens per choice in the worst case")
    choices: int
    worst_cost: str = Field(description="What would be held, and the most it can cost")
    worst_cost_nano: int
    expected_cost: str = Field(description="For an answer of 256 tokens, or max_tokens if that is less")
    expected_cost_nano: int
    price_in_max: str
    price_out_max: str
    nodes: list[str] = Field(description="Whom it would be asked of, in order; chance may draw another")


_REFUSALS: Final[dict[int | str, dict[str, Any]]] = {
    status: {"model": RefusalOut} for status in (400, 401, 403, 404, 413, 429, 503)
}
_BODY: Final = {
    "requestBody": {
        "required": True,
        "description": "A chat completion request, or a text completion request (with `prompt`)",
        "content": {"application/json": {"schema": {"type": "object"}}},
    }
}


@router.post("/v1/quote", tags=["inference"], responses=_REFUSALS, openapi_extra=_BODY)
async def quote(request: Request, identity: InferenceIdentity) -> QuoteOut:
    """Price a request without making it: worst and expected cost.  Nothing is held or charged."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > BODY_BYTES_MAX:
            raise Refusal(413, "body_too_large", f"a body has at most {BODY_BYTES_MAX} bytes")
    found: Quote = await request.app.state.chat.quote(
        identity.person_id, bytes(body), is_chat=not _has_prompt(bytes(body))
    )
    return QuoteOut(
        model=found.model,
        prompt_tokens=found.prompt_tokens,
        max_tokens=found.max_tokens,
        choices=found.choices,
        worst_cost=dollars(found.worst),
        worst_cost_nano=found.worst.n,
        expected_cost=dollars(found.expected),
        expected_cost_nano=found.expected.n,
        price_in_max=dollars(Nano(found.price_in_max)),
        price_out_max=dollars(Nano(found.price_out_max)),
        nodes=[node.node_id for node in found.nodes],
    )


class _Prompted(msgspec.Struct):
    prompt: Any = None


def _has_prompt(body: bytes) -> bool:
    try:
        return msgspec.json.decode(body, type=_Prompted).prompt is not None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return False  # the reader of chats says what is wrong
