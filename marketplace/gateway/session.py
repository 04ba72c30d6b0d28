"""One request's facts, filled in as it is served."""

from __future__ import annotations

from uuid import UUID

import msgspec

from marketplace.gateway.admission import Reserved
from marketplace.gateway.answer import Answer
from marketplace.gateway.answer_shapes import UsageOut
from marketplace.gateway.ports import KeyFacts
from marketplace.gateway.requests import InferenceRequest
from marketplace.ledger.lease_book import Hold
from marketplace.metering.counting import TokenCounter
from marketplace.platform.limits import Taken
from marketplace.routing.choice import Decision, NodeView
from node_agent.protocol import Delta


class Session(msgspec.Struct, eq=False):
    """What is known of a request so far."""

    request_id: UUID
    started: float
    """Monotonic seconds."""
    key_id: UUID | None = None
    person_id: UUID | None = None
    buyer: int = 0
    """Ledger account; 0 until the key is known."""
    model: str = ""
    request: InferenceRequest | None = None
    request_sha256: bytes = bytes(32)
    """Of the body as the buyer sent it."""
    counter: TokenCounter | None = None
    prompt_tokens: int = 0
    """Over all prompts, as billed."""
    prompt_longest: int = 0
    """The longest prompt, which has to fit the context."""
    beginning: int | None = None
    """Names how the conversation begins, for the node whose cache is warm."""
    max_tokens: int = 0
    """Per choice, as the node is told."""
    clamped_from: int | None = None
    """What the buyer wanted, where the balance affords less."""
    key: KeyFacts | None = None
    taken: Taken | None = None
    reserved: Reserved | None = None
    """Taken of the key's and the account's own limits; given back at the end."""
    usage: UsageOut | None = None
    """What was billed, once it is."""
    hold: Hold | None = None
    """Ours until a settlement takes it over."""
    decision: Decision | None = None
    node: NodeView | None = None
    """The node being asked; its prices are the ones in force for this request (V7)."""
    tries: int = 0
    """Nodes asked so far."""
    answer: Answer | None = None
    first_delta: float | None = None
    has_streamed: bool = False
    """Bytes of an answer have left for the buyer: no other node may take over, no other status be sent."""
    held_back: list[Delta] = []
    """The stream's last frames, which wait for the charge's commit."""
    is_charged: bool = False
    """A charge was begun."""
    is_overtaken: bool = False
    """It is charged already: another gateway served it under the same id."""
    is_recorded: bool = False
    """Its usage row is posted, or on its way."""
    status: int = 0

    @property
    def log_fields(self) -> dict[str, str]:
        """What a log line about this request carries; nothing of its content."""
        fields = {"request_id": str(self.request_id)}
        if self.node is not None:
            fields["node"] = self.node.node_id
        return fields

    @property
    def is_stream(self) -> bool:
        return self.request is not None and self.request.is_stream

    @property
    def choices(self) -> int:
        return 1 if self.request is None else self.request.choices
