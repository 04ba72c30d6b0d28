"""What gateways and node agents say to one another.

The one idea: an answer is a numbered row of typed frames, so damage is noticed and never served.
Core NATS delivers at most once; a gap, a duplicate, a frame too many or silence fails the request.

The law of a request:

1. The gateway publishes `Request` on `request_subject(node)` with a reply subject of its own.
2. The node answers `Accepted` (seq 0) or `Failed` (seq 0).
3. Then `Delta`s, with `Heartbeat`s whenever nothing else was sent for `HEARTBEAT_MS`.
4. Last comes exactly one `End` or `Failed`; nothing follows it. `seq` rises by one per frame of any type.
5. Only `Delta`s cost credit. `Request.credit` and every `Credit.up_to` name the total number of
   `Delta`s allowed since the request began; the largest seen counts, so a lost or repeated `Credit`
   is harmless. Out of credit, the node stops reading its engine; after `CREDIT_STALL_MS` of that it gives up.
6. The gateway may publish `Cancel` on `control_subject(node)` at any time; the node aborts in the
   engine and sends `Failed(code=CANCELLED)`, which the gateway is free not to wait for.
7. A gateway that dies cancels nothing. So now and then (`LISTENERS_ASKED_MS`) the node gives a frame a
   reply subject of its own; if nobody hears it, NATS says so there, and the node aborts as on `Cancel`.
8. A gateway with many streams asks for `frame_gap_ms`: after each frame of a stream's text the node reads its
   engine again at the next multiple of so long on its clock.  What comes meanwhile travels in one frame, and
   the frames of all streams of a node travel together.  What follows a choice's last words is not waited for.

Messages grow only by appending optional fields: unknown fields are ignored, so either side may be newer.
Times are milliseconds. Durations are relative, since operators' clocks are not trusted.
Prices are nano-dollars per million tokens.

    ProtocolError               the peer broke the law; the request or message is refused
    ├── MessageTooLargeError    above its limit, not decoded
    ├── MessageMalformedError   not a message of this protocol
    ├── FrameOutOfOrderError    gap, duplicate, missing `Accepted`, frame after the end
    ├── CreditExceededError     more `Delta`s than granted
    └── ProofInvalidError       signature, key or time of a proof is wrong
"""

import base64
import binascii
import collections.abc
import enum
import hashlib
import re
from typing import Annotated, Final, NewType, TypeVar

import msgspec

VERSION: Final = 1

# ---------------------------------------------------------------------------------------------
# Limits (attack row A62).  Everything has one.

FRAME_BYTES_MAX: Final = 256 * 1024  # one reply frame, encoded
REPLY_BYTES_MAX: Final = 16 * 1024 * 1024  # all frames of one answer
BODY_BYTES_MAX: Final = 960 * 1024  # the request body: fits NATS' default payload of 1 MiB
REQUEST_BYTES_MAX: Final = BODY_BYTES_MAX + 4 * 1024
CONTROL_BYTES_MAX: Final = 1024
STATUS_BYTES_MAX: Final = 128 * 1024
NONCE_CHARS_MAX: Final = 128  # of a NATS server
MODELS_MAX: Final = 64  # models one node may offer
MESSAGE_CHARS_MAX: Final = 500  # the text of a failure
CHOICES_MAX: Final = 128  # `n`
TOKEN_COUNT_MAX: Final = (1 << 31) - 1  # what a column of a database holds
CHOICE_DELTAS_MAX: Final = 512  # of a frame: the engine's events since the last one
TOKEN_IDS_MAX: Final = 64 * 1024  # of a choice in a frame
PROMPT_IDS_PER_FRAME: Final = 32 * 1024  # at most five bytes each
TOP_LOGPROBS_MAX: Final = 128  # of a token
PIECES_MAX: Final = 16 * 1024  # of a frame: choices, pieces of tool calls, tokens with logprobs, their rivals
PRICE_MAX: Final = 10**15  # $1,000,000 per million tokens, in nano-dollars: a typing error, not a price

HEARTBEAT_MS: Final = 5_000  # node: longest silence on a running request
IDLE_MS_MAX: Final = 30_000  # gateway: longest silence it bears; node: longest silence of an engine
FIRST_TOKEN_MS_MAX: Final = 30_000  # gateway: from publishing to the first `Delta`
WALL_MS_MAX: Final = 600_000  # longest request
ACCEPT_MS_MAX: Final = 5_000  # gateway: from publishing to `Accepted` or `Failed`
CREDIT_STALL_MS: Final = 30_000  # node: longest wait for credit
CREDIT_DEFAULT: Final = 64  # `Delta`s granted with a request
FRAME_GAP_MS_MAX: Final = 1_000  # a gateway may ask for between two frames of a stream
LISTENERS_ASKED_MS: Final = 1_000  # node: from one question whether anybody listens to the next, at least
STATUS_EVERY_MS: Final = 3_000
NODE_SILENT_MS_MAX: Final = 60_000  # a node without a status for this long is out
PROOF_SKEW_MS_MAX: Final = 30_000  # attack row A83


# ---------------------------------------------------------------------------------------------
# Errors


class ProtocolError(Exception):
    """The peer broke the law of this module."""


class MessageTooLargeError(ProtocolError):
    """Above its limit; it was not decoded."""


class MessageMalformedError(ProtocolError):
    """Not a message of this protocol, or a field out of its range."""


class FrameOutOfOrderError(ProtocolError):
    """A gap, a duplicate, a missing `Accepted`, or a frame after the end."""


class CreditExceededError(ProtocolError):
    """The node sent more `Delta`s than it was granted."""


class ProofInvalidError(ProtocolError):
    """The signature, the key or the time of a proof is wrong."""


# ---------------------------------------------------------------------------------------------
# Names and subjects

NodeId = NewType("NodeId", str)

_NODE_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")


def parse_node_id(text: str) -> NodeId:
    """Give back `text` as a node id; one NATS subject token, so it can widen no permission."""
    if _NODE_ID.fullmatch(text) is None:
        raise MessageMalformedError("a node id is 1 to 64 of A-Z a-z 0-9 _ -")
    return NodeId(text)


STATUS_SUBJECTS: Final = "status.*"  # every node's status, for subscribers


def request_subject(node: NodeId) -> str:
    return f"node.{node}.request"


def control_subject(node: NodeId) -> str:
    return f"node.{node}.control"


def node_subjects(node: NodeId) -> str:
    """All a node may subscribe to."""
    return f"node.{node}.>"


def receipts_subject(node: NodeId) -> str:
    """Where a node is shown receipts of what it served, to sign them too."""
    return f"node.{node}.receipts"


def unheard_subject(node: NodeId, number: str = "*") -> str:
    """Where NATS tells a node that nobody listens to its answer of this number; for subscribers, any."""
    return f"node.{node}.unheard.{number}"


def status_subject(node: NodeId) -> str:
    """The only subject a node may publish to, besides replies."""
    return f"status.{node}"


# ---------------------------------------------------------------------------------------------
# Field types with their ranges

TokenCount = Annotated[int, msgspec.Meta(ge=0, le=TOKEN_COUNT_MAX)]
TokenId = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
Sequence = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
Millis = Annotated[int, msgspec.Meta(ge=0, lt=1 << 53)]
Price = Annotated[int, msgspec.Meta(ge=0, le=PRICE_MAX)]
ModelName = Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
RequestId = Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
ShortText = Annotated[str, msgspec.Meta(max_length=200)]
ChoiceIndex = Annotated[int, msgspec.Meta(ge=0, lt=CHOICES_MAX)]


# ---------------------------------------------------------------------------------------------
# Gateway → node


class Request(msgspec.Struct, tag="request", frozen=True):
    """One request for the engine.

    `body` is the JSON object the engine gets, already reduced by the marketplace to permitted fields.
    The agent sets `stream`, usage options and `return_token_ids` itself and drops what it finds of them.
    `stream` says whether the buyer streams; if not, the agent gathers the answer into few `Delta`s.
    `deadline_ms` is how long the node may take, counted from receipt.
    `kind` is `chat` (the body has `messages`) or `completion` (it has a `prompt`).
    `frame_gap_ms`: a stream's text leaves at multiples of it on the node's clock, but for the first.
    """

    v: int
    id: RequestId
    model: ModelName
    body: Annotated[bytes, msgspec.Meta(max_length=BODY_BYTES_MAX)]
    stream: bool
    deadline_ms: Annotated[int, msgspec.Meta(gt=0, le=WALL_MS_MAX)]
    credit: Annotated[int, msgspec.Meta(gt=0, lt=1 << 31)] = CREDIT_DEFAULT
    kind: ShortText = "chat"
    frame_gap_ms: Annotated[int, msgspec.Meta(ge=0, le=FRAME_GAP_MS_MAX)] = 0


class Cancel(msgspec.Struct, tag="cancel", frozen=True):
    """Nobody waits for this request any more; abort it in the engine."""

    id: RequestId


class Credit(msgspec.Struct, tag="credit", frozen=True):
    """The node may send `Delta`s until it has sent `up_to` of them in all."""

    id: RequestId
    up_to: Annotated[int, msgspec.Meta(gt=0, lt=1 << 31)]


Control = Cancel | Credit


# ---------------------------------------------------------------------------------------------
# Node → gateway


class FailureCode(enum.StrEnum):
    """Why a node did not finish. A code this side does not know reads as `INTERNAL`."""

    OVERLOADED = "overloaded"
    ENGINE_DOWN = "engine_down"
    BAD_REQUEST = "bad_request"
    DRAINING = "draining"
    UNKNOWN_MODEL = "unknown_model"
    DEADLINE = "deadline"
    CANCELLED = "cancelled"
    INTERNAL = "internal"

    @classmethod
    def _missing_(cls, value: object) -> "FailureCode":
        del value
        return cls.INTERNAL


class TopLogprob(msgspec.Struct, array_like=True, frozen=True):
    token: str
    logprob: float
    bytes: list[int] | None = None


class TokenLogprob(msgspec.Struct, array_like=True, frozen=True):
    token: str
    logprob: float
    bytes: list[int] | None = None
    top: Annotated[list[TopLogprob], msgspec.Meta(max_length=TOP_LOGPROBS_MAX)] = []


class ToolCallDelta(msgspec.Struct, array_like=True, frozen=True):
    """A piece of a tool call; `arguments` pieces concatenate per `index`."""

    index: ChoiceIndex
    id: ShortText | None = None
    name: ShortText | None = None
    arguments: str | None = None


class ChoiceDelta(msgspec.Struct, array_like=True):
    """What the engine added to one choice in one of its events.

    `token_ids` are the ids of exactly this event, None when the engine does not tell them.
    """

    index: ChoiceIndex = 0
    role: ShortText | None = None
    content: str | None = None
    reasoning: str | None = None
    tool_calls: Annotated[list[ToolCallDelta], msgspec.Meta(max_length=PIECES_MAX)] | None = None
    logprobs: Annotated[list[TokenLogprob], msgspec.Meta(max_length=PIECES_MAX)] | None = None
    finish_reason: ShortText | None = None
    stop_reason: str | int | None = None
    token_ids: Annotated[list[TokenId], msgspec.Meta(max_length=TOKEN_IDS_MAX)] | None = None


class Accepted(msgspec.Struct, tag=0, array_like=True, frozen=True):
    """The node took the request and hands it to its engine."""

    seq: Sequence


class Delta(msgspec.Struct, tag=1, array_like=True, frozen=True):
    """A part of the answer: one or several engine events, in order; of at most `PIECES_MAX` pieces in all.

    `prompt_token_ids` come with the first `Delta`; when too long for a frame, later ones continue them.
    The counts are the engine's running totals after this frame: the operator's word, None if untold.
    """

    seq: Sequence
    choices: Annotated[list[ChoiceDelta], msgspec.Meta(max_length=CHOICE_DELTAS_MAX)]
    prompt_token_ids: Annotated[list[TokenId], msgspec.Meta(max_length=PROMPT_IDS_PER_FRAME)] | None = None
    prompt_tokens: TokenCount | None = None
    completion_tokens: TokenCount | None = None


class Heartbeat(msgspec.Struct, tag=2, array_like=True, frozen=True):
    """Still working."""

    seq: Sequence


class End(msgspec.Struct, tag=3, array_like=True, frozen=True):
    """The answer is complete. Counts are the engine's final word, None if it gave none that made sense."""

    seq: Sequence
    prompt_tokens: TokenCount | None = None
    completion_tokens: TokenCount | None = None
    cached_tokens: TokenCount | None = None
    engine_ms: Millis = 0


class Failed(msgspec.Struct, tag=4, array_like=True, frozen=True):
    """The answer ends here, incomplete. `is_retriable`: another node may do better with the same request."""

    seq: Sequence
    code: FailureCode
    message: Annotated[str, msgspec.Meta(max_length=MESSAGE_CHARS_MAX)]
    is_retriable: bool


Frame = Accepted | Delta | Heartbeat | End | Failed


def pieces(choices: "collections.abc.Sequence[ChoiceDelta]") -> int:
    """How many things these consist of: on the wire one may have two bytes, written out it has sixty."""
    count = len(choices)
    for choice in choices:
        if choice.tool_calls:
            count += len(choice.tool_calls)
        if choice.logprobs:
            count += sum(1 + len(token.top) for token in choice.logprobs)
    return count


class ModelStatus(msgspec.Struct, frozen=True, omit_defaults=True):
    """One model a node offers. `capacity` is how many requests the node runs at once before it refuses."""

    name: ModelName
    context: TokenCount
    price_in: Price
    price_out: Price
    running: TokenCount = 0
    waiting: TokenCount = 0
    kv_used_permille: Annotated[int, msgspec.Meta(ge=0, le=1000)] = 0
    capacity: TokenCount = 0
    tokenizer_sha256: Annotated[str, msgspec.Meta(max_length=64)] = ""
    is_ready: bool = True


class Status(msgspec.Struct, tag="status", frozen=True):
    """What a node says of itself every `STATUS_EVERY_MS`. A node that is draining gets no new requests."""

    v: int
    node_id: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    seq: Sequence
    time_ms: Millis
    version: ShortText
    is_draining: bool
    models: Annotated[list[ModelStatus], msgspec.Meta(max_length=MODELS_MAX)]
    served: Sequence = 0
    failed: Sequence = 0


# ---------------------------------------------------------------------------------------------
# Bytes

_encoder: Final = msgspec.msgpack.Encoder()
_request_decoder: Final = msgspec.msgpack.Decoder(Request)
_control_decoder: "Final[msgspec.msgpack.Decoder[Control]]" = msgspec.msgpack.Decoder(Control)
_frame_decoder: "Final[msgspec.msgpack.Decoder[Frame]]" = msgspec.msgpack.Decoder(Frame)
_status_decoder: Final = msgspec.msgpack.Decoder(Status)

NOT_DECODED: Final = (msgspec.MsgspecError, RecursionError, UnicodeDecodeError)
"""What msgspec raises of foreign bytes; of text that is not UTF-8 it is not an error of its own."""

_Message = TypeVar("_Message")


def encode(message: "Request | Control | Frame | Status | Receipts | Countersigned") -> bytes:
    return _encoder.encode(message)


def _decode(decoder: "msgspec.msgpack.Decoder[_Message]", data: bytes, limit: int, what: str) -> _Message:
    if len(data) > limit:
        raise MessageTooLargeError(f"{what} of {len(data)} bytes, at most {limit} are allowed")
    try:
        return decoder.decode(data)
    except NOT_DECODED as error:
        raise MessageMalformedError(f"{what}: {error}") from error


def decode_request(data: bytes) -> Request:
    """Give back the request in `data`; raises `ProtocolError`."""
    return _decode(_request_decoder, data, REQUEST_BYTES_MAX, "request")


def decode_control(data: bytes) -> Control:
    """Give back the control message in `data`; raises `ProtocolError`."""
    return _decode(_control_decoder, data, CONTROL_BYTES_MAX, "control message")


def decode_frame(data: bytes) -> Frame:
    """Give back the frame in `data`; raises `ProtocolError`. `ReplyReader` also checks the order."""
    return _decode(_frame_decoder, data, FRAME_BYTES_MAX, "frame")


def decode_status(data: bytes) -> Status:
    """Give back the status in `data`; raises `ProtocolError`.

    The caller compares its node id with the subject it came on.
    """
    return _decode(_status_decoder, data, STATUS_BYTES_MAX, "status")


class ReplyReader:
    """The gateway's reading of one reply: every law that needs no clock.

    Feed it the payloads as they arrive; it gives back frames, or raises `ProtocolError`, after which
    the reply is worthless from here on. The time limits above are the caller's to keep.
    """

    __slots__ = ("_bytes", "_credit", "_deltas", "_next", "is_done")

    def __init__(self, credit: int) -> None:
        self._credit = credit
        self._deltas = 0
        self._bytes = 0
        self._next = 0
        self.is_done = False

    def feed(self, data: bytes) -> Frame:
        self._bytes += len(data)
        if self._bytes > REPLY_BYTES_MAX:
            raise MessageTooLargeError(f"the answer passes {REPLY_BYTES_MAX} bytes")
        frame = decode_frame(data)
        if self.is_done:
            raise FrameOutOfOrderError("a frame after the end")
        if frame.seq != self._next:
            raise FrameOutOfOrderError(f"frame {frame.seq} where {self._next} was due")
        if self._next == 0 and not isinstance(frame, Accepted | Failed):
            raise FrameOutOfOrderError("an answer opens with Accepted or Failed")
        if self._next > 0 and isinstance(frame, Accepted):
            raise FrameOutOfOrderError("Accepted twice")
        self._next += 1
        if isinstance(frame, Delta):
            if pieces(frame.choices) > PIECES_MAX:
                raise MessageTooLargeError(f"a frame of more than {PIECES_MAX} pieces")
            self._deltas += 1
            if self._deltas > self._credit:
                raise CreditExceededError(f"{self._deltas} deltas sent, {self._credit} granted")
        elif isinstance(frame, End | Failed):
            self.is_done = True
        return frame

    def grant(self, up_to: int) -> None:
        """Note that a `Credit` of `up_to` is sent."""
        self._credit = max(self._credit, up_to)

    def top_up(self, window: int) -> int | None:
        """Give back (and note) a new `Credit.up_to` once half the window is used, else None.

        Call it after the frames so far went to the buyer; a slow buyer then slows the engine.
        """
        if self.is_done or self._credit - self._deltas > window // 2:
            return None
        self.grant(self._deltas + window)
        return self._credit


# ---------------------------------------------------------------------------------------------
# Receipts (B1): what both sides sign of a served request.
#
# A statement is a JSON object, signed as the bytes it came in.  Statements of one node are gathered in
# pages: the Merkle tree of RFC 6962 over a page (`receipt_leaf`, `merkle_root`).  The marketplace signs
# `page_signing_bytes`, the node `countersigning_bytes`, each with Ed25519: one signature a page, and 32
# bytes of proof per level to show that a statement is in it.

STATEMENTS_MAX: Final = 512  # of a page; at the longest model name it still fits NATS' payload
STATEMENT_BYTES_MAX: Final = 1_800
RECEIPTS_BYTES_MAX: Final = 1024 * 1024
COUNTERSIGNED_BYTES_MAX: Final = 8 * 1024
RESPONSE_PURPOSE: Final = b"tollway response v1\n"
_PAGE_PURPOSE: Final = b"tollway receipts v1\n"
_COUNTERSIGNED_PURPOSE: Final = b"tollway receipts countersigned v1\n"


class Statement(msgspec.Struct, frozen=True):
    """What a receipt says.  Counts are as billed; money is nano-dollars, prices per million tokens."""

    v: int
    id: str
    """The request's id, a UUID; the receipt's and the charge's too."""
    time_ms: int
    """When the request arrived."""
    model: str
    node: str
    operator: str
    request_sha256: str | None
    """Of the body the buyer sent, byte for byte; None where a crash left only the charge."""
    response_sha256: str | None
    """`ResponseDigest` of what was delivered."""
    prompt_tokens: int
    completion_tokens: int
    counted_by: str
    counted_on: str | None
    """`ids` the engine sampled, or the delivered `text` encoded again."""
    price_version: int
    price_in: int | None
    price_out: int | None
    cost_nano: int
    operator_nano: int
    status: int
    finish_reason: str | None


class Receipts(msgspec.Struct, tag="receipts", frozen=True):
    """Marketplace → node: a page of statements about this node, signed by `public_key`."""

    v: int
    page: Annotated[str, msgspec.Meta(max_length=64)]
    public_key: Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
    signature: Annotated[bytes, msgspec.Meta(min_length=64, max_length=64)]
    statements: Annotated[
        list[Annotated[bytes, msgspec.Meta(max_length=STATEMENT_BYTES_MAX)]],
        msgspec.Meta(min_length=1, max_length=STATEMENTS_MAX),
    ]


class Countersigned(msgspec.Struct, tag="countersigned", frozen=True):
    """Node → marketplace: the node agrees with the page, but for the statements at `disputed`."""

    signature: Annotated[bytes, msgspec.Meta(min_length=64, max_length=64)]
    disputed: Annotated[
        list[Annotated[int, msgspec.Meta(ge=0, lt=STATEMENTS_MAX)]], msgspec.Meta(max_length=STATEMENTS_MAX)
    ] = []


_receipts_decoder: Final = msgspec.msgpack.Decoder(Receipts)
_countersigned_decoder: Final = msgspec.msgpack.Decoder(Countersigned)
_statement_decoder: Final = msgspec.json.Decoder(Statement)
encode_statement: Final = msgspec.json.Encoder().encode


def decode_receipts(data: bytes) -> Receipts:
    """Give back the page in `data`; raises `ProtocolError`."""
    return _decode(_receipts_decoder, data, RECEIPTS_BYTES_MAX, "page of receipts")


def decode_countersigned(data: bytes) -> Countersigned:
    """Give back the answer to a page; raises `ProtocolError`."""
    return _decode(_countersigned_decoder, data, COUNTERSIGNED_BYTES_MAX, "countersignature")


def decode_statement(data: bytes) -> Statement:
    """Give back what a statement says; raises `ProtocolError`."""
    if len(data) > STATEMENT_BYTES_MAX:
        raise MessageTooLargeError(f"a statement has at most {STATEMENT_BYTES_MAX} bytes")
    try:
        return _statement_decoder.decode(data)
    except NOT_DECODED as error:
        raise MessageMalformedError(f"statement: {error}") from error


def receipt_leaf(statement: bytes) -> bytes:
    return hashlib.sha256(b"\x00" + statement).digest()


def merkle_parent(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\x01" + left + right).digest()


def merkle_root(leaves: "collections.abc.Sequence[bytes]") -> bytes:
    """The root over one or more leaves: a row is paired level by level, an odd last one moves up."""
    row = list(leaves)
    while len(row) > 1:
        paired = [merkle_parent(row[at], row[at + 1]) for at in range(0, len(row) - 1, 2)]
        row = paired + row[len(paired) * 2 :]
    return row[0]


def merkle_proof(leaves: "collections.abc.Sequence[bytes]", position: int) -> list[bytes]:
    """The siblings from a leaf to the root, nearest first."""
    row, proof = list(leaves), []
    while len(row) > 1:
        sibling = position ^ 1
        if sibling < len(row):
            proof.append(row[sibling])
        paired = [merkle_parent(row[at], row[at + 1]) for at in range(0, len(row) - 1, 2)]
        row = paired + row[len(paired) * 2 :]
        position //= 2
    return proof


def root_from_proof(
    leaf: bytes, position: int, count: int, proof: "collections.abc.Sequence[bytes]"
) -> bytes:
    """The root that a leaf at `position` of `count` leads to; raises `ProofInvalidError`."""
    if not 0 <= position < count:
        raise ProofInvalidError("the position is outside the page")
    found, width, at, siblings = leaf, count, position, iter(proof)
    while width > 1:
        if at ^ 1 < width:
            sibling = next(siblings, None)
            if sibling is None:
                raise ProofInvalidError("the proof is too short")
            found = merkle_parent(sibling, found) if at % 2 else merkle_parent(found, sibling)
        at, width = at // 2, (width + 1) // 2
    if next(siblings, None) is not None:
        raise ProofInvalidError("the proof is too long")
    return found


def page_signing_bytes(count: int, root: bytes) -> bytes:
    """What the marketplace signs of a page."""
    return _PAGE_PURPOSE + count.to_bytes(4, "big") + root


def countersigning_bytes(count: int, root: bytes, disputed: "collections.abc.Sequence[int]") -> bytes:
    """What the node signs of a page."""
    return (
        _COUNTERSIGNED_PURPOSE
        + count.to_bytes(4, "big")
        + root
        + b"".join(position.to_bytes(4, "big") for position in disputed)
    )


def verify_page_signature(public_key: bytes, count: int, root: bytes, signature: bytes) -> None:
    """Return if the marketplace's key signed this page; else raise `ProofInvalidError`."""
    _check_ed25519(public_key, page_signing_bytes(count, root), signature)


def verify_countersignature(
    public_key: str, count: int, root: bytes, disputed: "collections.abc.Sequence[int]", signature: bytes
) -> None:
    """Return if the node's nkey signed this page; else raise `ProofInvalidError`."""
    _check_ed25519(parse_public_key(public_key), countersigning_bytes(count, root, disputed), signature)


class ResponseDigest:
    """The hash of a delivered answer, however it was cut into pieces.

    SHA-256 over `RESPONSE_PURPOSE` and, for each choice in order of index: its index, SHA-256 of its
    reasoning, SHA-256 of its content, the number of its tool calls, and for each of them in order of
    index SHA-256 of its name and SHA-256 of its arguments.  Numbers are 4 bytes, big endian; texts are
    UTF-8, the pieces concatenated; a text that never came is the empty one.
    """

    def __init__(self) -> None:
        self._choices: dict[int, _ChoiceDigest] = {}

    def add(self, delta: ChoiceDelta) -> None:
        """Take in a piece."""
        choice = self._choices.get(delta.index)
        if choice is None:
            choice = self._choices[delta.index] = _ChoiceDigest()
        if delta.content:
            choice.content.update(delta.content.encode())
        if delta.reasoning:
            choice.reasoning.update(delta.reasoning.encode())
        for call in delta.tool_calls or ():
            name, arguments = choice.calls.setdefault(call.index, (hashlib.sha256(), hashlib.sha256()))
            name.update((call.name or "").encode())
            arguments.update((call.arguments or "").encode())

    def digest(self) -> bytes:
        whole = hashlib.sha256(RESPONSE_PURPOSE)
        for index, choice in sorted(self._choices.items()):
            whole.update(index.to_bytes(4, "big") + choice.reasoning.digest() + choice.content.digest())
            whole.update(len(choice.calls).to_bytes(4, "big"))
            for _, (name, arguments) in sorted(choice.calls.items()):
                whole.update(name.digest() + arguments.digest())
        return whole.digest()


class _ChoiceDigest:
    __slots__ = ("calls", "content", "reasoning")

    def __init__(self) -> None:
        self.reasoning, self.content = hashlib.sha256(), hashlib.sha256()
        self.calls: dict[int, tuple[hashlib._Hash, hashlib._Hash]] = {}


# ---------------------------------------------------------------------------------------------
# Identity: enrolment (HTTP JSON, POST {api}/api/nodes/enroll) and the challenge at every connection.
#
# A node signs with an Ed25519 nkey of the user kind ("U…"). It connects to NATS with that key: the
# server sends a fresh nonce, the client signs it, and the auth callout gets all three
# (`nats.connect_opts.nkey`, `.sig`, `nats.client_info.nonce`), so a recorded connection cannot be
# replayed and no clock is involved. nats-server issues nonces once an nkey user is configured: give
# the callout service itself an nkey (`accounts {AUTH {users: [{nkey: U…}]}}`, `auth_users: [U…]`;
# seen with nats-server 2.15.1). Enrolment signs a text that names its purpose, which no nonce does.

ENROLL_PATH: Final = "/api/nodes/enroll"

_ENROLL_PURPOSE: Final = b"tollway enroll v1\n"
_NKEY_USER_PREFIX: Final = 20 << 3
_SIGNATURE_BYTES: Final = 64
_TO_URL_ALPHABET: Final = str.maketrans("+/", "-_")


class EnrollRequest(msgspec.Struct, frozen=True):
    """The one-use token, the agent's public key, and proof that the agent holds the private one."""

    token: Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
    public_key: Annotated[str, msgspec.Meta(max_length=64)]
    time_ms: Millis
    signature: Annotated[str, msgspec.Meta(max_length=128)]
    agent_version: ShortText
    name: ShortText = ""


class EnrollReply(msgspec.Struct, frozen=True):
    """What the agent keeps of its enrolment."""

    node_id: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    nats_url: Annotated[str, msgspec.Meta(max_length=500)]
    operator: ShortText = ""


def enroll_signing_bytes(token: str, public_key: str, time_ms: int) -> bytes:
    """What an agent signs to enrol."""
    return _ENROLL_PURPOSE + f"{token}\n{public_key}\n{time_ms}".encode()


def verify_connect_challenge(*, public_key: str, nonce: str, signature: str) -> None:
    """Return if `public_key` signed the server's `nonce`; else raise `ProofInvalidError`.

    `signature` is base64 of either alphabet, as NATS clients differ. The key is the node's identity:
    look the node up by it, and refuse what is unknown or revoked.
    """
    if not nonce or len(nonce) > NONCE_CHARS_MAX:
        raise ProofInvalidError("the server sent no nonce: is an nkey user configured?")
    _check_signature(public_key, nonce.encode(), _from_base64(signature))


def verify_enroll_request(request: EnrollRequest, now_ms: int) -> None:
    """Return if the sender holds the private key of `request.public_key`; else raise `ProofInvalidError`."""
    signed = enroll_signing_bytes(request.token, request.public_key, request.time_ms)
    _check_signature(request.public_key, signed, _from_base64(request.signature))
    _check_time(request.time_ms, now_ms)


def parse_public_key(text: str) -> bytes:
    """Give back the 32 bytes of an nkey of the user kind; raises `ProofInvalidError`.

    Format: base32(prefix byte, key, CRC-16/XMODEM little endian) without padding.
    """
    try:
        raw = base64.b32decode(text + "=" * (-len(text) % 8))
    except (binascii.Error, ValueError) as error:
        raise ProofInvalidError("the public key is not base32") from error
    if len(raw) != 35 or raw[0] != _NKEY_USER_PREFIX:
        raise ProofInvalidError("the public key is not a user nkey")
    if binascii.crc_hqx(raw[:-2], 0).to_bytes(2, "little") != raw[-2:]:
        raise ProofInvalidError("the public key's checksum is wrong")
    return raw[1:-2]


def _check_signature(public_key: str, signed: bytes, signature: bytes) -> None:
    _check_ed25519(parse_public_key(public_key), signed, signature)


def _check_ed25519(public_key: bytes, signed: bytes, signature: bytes) -> None:
    from nacl.exceptions import BadSignatureError  # nobody verifies on the way of an answer
    from nacl.signing import VerifyKey

    key = VerifyKey(public_key)
    if len(signature) != _SIGNATURE_BYTES:
        raise ProofInvalidError("a signature has 64 bytes")
    try:
        key.verify(signed, signature)
    except BadSignatureError as error:
        raise ProofInvalidError("the signature is wrong") from error


def _check_time(time_ms: int, now_ms: int) -> None:
    skew_ms = abs(now_ms - time_ms)
    if skew_ms > PROOF_SKEW_MS_MAX:
        raise ProofInvalidError(f"the clocks differ by {skew_ms} ms, {PROOF_SKEW_MS_MAX} are allowed")


def to_base64url(data: bytes) -> str:
    """Give back `data` in URL-safe base64 without padding."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _from_base64(text: str) -> bytes:
    plain = text.rstrip("=").translate(_TO_URL_ALPHABET)
    try:
        return base64.b64decode(plain + "=" * (-len(plain) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError) as error:
        raise ProofInvalidError("the signature is not base64") from error
