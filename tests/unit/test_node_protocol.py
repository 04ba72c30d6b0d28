"""The law between gateways and nodes, and every limit in it."""

import base64
import contextlib
import os

import msgspec
import nkeys
import pytest
from hypothesis import given
from hypothesis import strategies as st

from node_agent import protocol
from node_agent.identity import Identity
from node_agent.protocol import (
    Accepted,
    Cancel,
    ChoiceDelta,
    Credit,
    CreditExceededError,
    Delta,
    End,
    Failed,
    FailureCode,
    FrameOutOfOrderError,
    Heartbeat,
    MessageMalformedError,
    MessageTooLargeError,
    ProofInvalidError,
    ProtocolError,
    ReplyReader,
    TokenLogprob,
    ToolCallDelta,
    TopLogprob,
    encode,
)


def raw(*fields: object) -> bytes:
    return msgspec.msgpack.encode(list(fields))


@pytest.mark.parametrize(
    "frame",
    [
        Accepted(0),
        Heartbeat(7),
        End(3, 1, 2, 0, 40),
        End(3),
        Failed(1, FailureCode.OVERLOADED, "full", True),
        Delta(
            1,
            [
                ChoiceDelta(
                    2,
                    role="assistant",
                    content="é🙂",
                    reasoning="hm",
                    tool_calls=[ToolCallDelta(0, "id", "name", "{")],
                    logprobs=[TokenLogprob("a", -0.5, [97], [TopLogprob("b", -1.5)])],
                    finish_reason="stop",
                    stop_reason=7,
                    token_ids=[1, 2],
                )
            ],
            [5, 6],
            2,
            2,
        ),
    ],
)
def test_frames_survive_the_wire(frame: protocol.Frame) -> None:
    assert protocol.decode_frame(encode(frame)) == frame


def test_control_and_status_survive_the_wire() -> None:
    for control in (Cancel("r"), Credit("r", 9)):
        assert protocol.decode_control(encode(control)) == control
    model = protocol.ModelStatus("m", 2048, 1, 2, running=3, kv_used_permille=500)
    status = protocol.Status(1, "n", 0, 5, "0.1", False, [model], 1, 2)
    assert protocol.decode_status(encode(status)) == status


def test_newer_peers_are_understood() -> None:
    assert protocol.decode_frame(raw(2, 4, "added later", {"x": 1})) == Heartbeat(4)
    assert protocol.decode_frame(raw(4, 0, "code of the future", "m", True)).code is FailureCode.INTERNAL
    cancel = msgspec.msgpack.encode({"type": "cancel", "id": "r", "why": "added later"})
    assert protocol.decode_control(cancel) == Cancel("r")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        raw(),
        raw(9, 0),
        raw(3, 0, -1),
        raw(3, 0, 2**63),
        raw(3, 0, float("nan")),
        raw(3, 0, "7"),
        raw(3, 0, 1.0),
        raw(3, -1),
        raw(1, 0, [[128]]),
        raw(1, 0, [[0, None, None, None, None, None, None, None, [-1]]]),
        raw(1, 0, [], [2**31]),
        raw(3, 0, 2**31),
        encode(Delta(0, [ChoiceDelta(content="ab")])).replace(b"ab", b"\xff\xfe"),
        raw(1, 0, [[]] * (protocol.CHOICE_DELTAS_MAX + 1)),
        raw(1, 0, [], [1] * (protocol.PROMPT_IDS_PER_FRAME + 1)),
        raw(1, 0, [[0, *[None] * 7, [1] * (protocol.TOKEN_IDS_MAX + 1)]]),
        raw(1, 0, [[0, None, None, None, [[0]] * (protocol.PIECES_MAX + 1)]]),
        raw(1, 0, [[0, *[None] * 4, [["a", 0]] * (protocol.PIECES_MAX + 1)]]),
        raw(1, 0, [[0, *[None] * 4, [["a", 0, None, [["a", 0]] * (protocol.TOP_LOGPROBS_MAX + 1)]]]]),
        raw(4, 0, "internal", "x" * 501, True),
        raw(4, 0, "internal", "x", 1),
    ],
)
def test_malformed_frames_are_refused(data: bytes) -> None:
    with pytest.raises(MessageMalformedError):
        protocol.decode_frame(data)


def test_receipts_that_are_not_utf_8_are_refused() -> None:
    countersigned = encode(protocol.Countersigned(b"s" * 64))
    with pytest.raises(MessageMalformedError):
        protocol.decode_countersigned(countersigned.replace(b"countersigned", b"counter\xff\xfeigned"))
    with pytest.raises(MessageMalformedError):
        protocol.decode_statement(b'{"id":"\xff\xfe"}')


@pytest.mark.parametrize(
    "choice",
    [
        ChoiceDelta(tool_calls=[ToolCallDelta(0)] * 100),
        ChoiceDelta(logprobs=[TokenLogprob("", 0)] * 100),
        ChoiceDelta(logprobs=[TokenLogprob("", 0, top=[TopLogprob("", 0)] * 99)]),
    ],
    ids=["tool calls", "logprobs", "top logprobs"],
)
def test_a_frames_pieces_are_limited_in_all(choice: ChoiceDelta) -> None:
    """Each list may be within its own limit, and yet they be more than a buyer can be written."""
    most = protocol.PIECES_MAX // 101
    small = ChoiceDelta()
    assert protocol.pieces([choice, small]) in {101, 102}
    feed([Accepted(0), Delta(1, [choice] * most)])
    with pytest.raises(MessageTooLargeError):
        feed([Accepted(0), Delta(1, [choice] * (most + 2))])


def test_sizes_are_limited() -> None:
    big = encode(Delta(0, [ChoiceDelta(content="x" * protocol.FRAME_BYTES_MAX)]))
    with pytest.raises(MessageTooLargeError):
        protocol.decode_frame(big)
    request = protocol.Request(1, "r", "m", b"x" * (protocol.BODY_BYTES_MAX + 1), True, 1)
    with pytest.raises(MessageMalformedError):
        protocol.decode_request(encode(request))
    with pytest.raises(MessageTooLargeError):
        protocol.decode_control(encode(Cancel("r" * 2000)))
    with pytest.raises(MessageTooLargeError):
        protocol.decode_status(b"x" * (protocol.STATUS_BYTES_MAX + 1))


def test_largest_request_fits_the_fabric() -> None:
    fields = (1, "r" * 64, "m" * 200, b"x" * protocol.BODY_BYTES_MAX, True, 600_000)
    data = encode(protocol.Request(*fields))
    assert len(data) <= protocol.REQUEST_BYTES_MAX < 1024 * 1024
    assert protocol.decode_request(data).body == fields[3]


@given(st.binary(max_size=300))
def test_any_bytes_decode_or_are_refused(data: bytes) -> None:
    for decode in (
        protocol.decode_frame,
        protocol.decode_control,
        protocol.decode_request,
        protocol.decode_status,
    ):
        with contextlib.suppress(ProtocolError):
            decode(data)


@pytest.mark.parametrize("text", ["", "a.b", "*", ">", "a b", "x" * 65, "é", "a\n"])
def test_node_ids_cannot_widen_a_subject(text: str) -> None:
    with pytest.raises(MessageMalformedError):
        protocol.parse_node_id(text)


def test_subjects() -> None:
    node = protocol.parse_node_id("n_1-A")
    assert protocol.request_subject(node) == "node.n_1-A.request"
    assert protocol.control_subject(node) == "node.n_1-A.control"
    assert protocol.status_subject(node) == "status.n_1-A"


# -- order and credit ---------------------------------------------------------------------------------


def feed(frames: list[protocol.Frame], credit: int = 10) -> ReplyReader:
    reader = ReplyReader(credit)
    for frame in frames:
        reader.feed(encode(frame))
    return reader


def test_lawful_reply_is_read() -> None:
    reader = feed([Accepted(0), Heartbeat(1), Delta(2, []), Heartbeat(3), Delta(4, []), End(5)])
    assert reader.is_done
    assert feed([Failed(0, FailureCode.DRAINING, "", True)]).is_done


@pytest.mark.parametrize(
    "frames",
    [
        [Accepted(1)],
        [Delta(0, [])],
        [End(0)],
        [Heartbeat(0)],
        [Accepted(0), Delta(2, [])],
        [Accepted(0), Delta(1, []), Delta(1, [])],
        [Accepted(0), Accepted(1)],
        [Accepted(0), End(1), End(2)],
        [Accepted(0), End(1), Delta(2, [])],
        [Failed(0, FailureCode.INTERNAL, "", True), Accepted(1)],
    ],
)
def test_gaps_duplicates_and_afterthoughts_are_refused(frames: list[protocol.Frame]) -> None:
    with pytest.raises(FrameOutOfOrderError):
        feed(frames)


def test_deltas_beyond_the_credit_are_refused_and_heartbeats_cost_none() -> None:
    beats = [Heartbeat(i) for i in range(1, 5)]
    deltas = [Delta(i, []) for i in range(5, 8)]
    feed([Accepted(0), *beats, *deltas[:2]], credit=2)
    with pytest.raises(CreditExceededError):
        feed([Accepted(0), *beats, *deltas], credit=2)


def test_credit_is_topped_up_at_half_a_window() -> None:
    reader = feed([Accepted(0), Delta(1, [])], credit=4)
    assert reader.top_up(4) is None
    reader.feed(encode(Delta(2, [])))
    assert reader.top_up(4) == 6
    assert reader.top_up(4) is None
    reader.feed(encode(End(3)))
    assert reader.top_up(100) is None


def test_answer_is_limited_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "REPLY_BYTES_MAX", 1000)
    deltas = [Delta(i, [ChoiceDelta(content="x" * 200)]) for i in range(1, 9)]
    feed([Accepted(0), *deltas[:4]])
    with pytest.raises(MessageTooLargeError):
        feed([Accepted(0), *deltas])


# -- proofs -------------------------------------------------------------------------------------------


def an_identity() -> Identity:
    return Identity(nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER).decode())


def test_connect_challenge() -> None:
    mine, other = nkeys.from_seed(an_identity().seed.encode()), an_identity()
    key = mine.public_key.decode()
    for signature in (base64.b64encode, base64.urlsafe_b64encode):
        signed = signature(mine.sign(b"nonce")).decode()
        protocol.verify_connect_challenge(public_key=key, nonce="nonce", signature=signed)
        protocol.verify_connect_challenge(public_key=key, nonce="nonce", signature=signed.rstrip("="))
    for bad in (
        {"nonce": "nonce2"},
        {"nonce": ""},
        {"public_key": other.public_key},
        {"public_key": "U" * 56},
        {"public_key": "é"},
        {"signature": ""},
        {"signature": "é"},
        {"signature": "AAAA"},
    ):
        fields = {"public_key": key, "nonce": "nonce", "signature": signed} | bad
        with pytest.raises(ProofInvalidError):
            protocol.verify_connect_challenge(**fields)


def test_enrolment_proves_the_key_and_the_time() -> None:
    identity = an_identity()
    request = identity.enroll_request(token="t", name="n", time_ms=1_000_000, agent_version="1")
    protocol.verify_enroll_request(request, now_ms=1_030_000)
    for now_ms in (1_030_001, 969_999):
        with pytest.raises(ProofInvalidError, match="clocks"):
            protocol.verify_enroll_request(request, now_ms)
    for change in ({"token": "t2"}, {"public_key": an_identity().public_key}, {"time_ms": 1_000_001}):
        with pytest.raises(ProofInvalidError):
            protocol.verify_enroll_request(msgspec.structs.replace(request, **change), 1_000_000)


@pytest.mark.parametrize("prefix", [nkeys.PREFIX_BYTE_ACCOUNT, nkeys.PREFIX_BYTE_SERVER])
def test_only_user_keys_are_nodes(prefix: int) -> None:
    key = nkeys.from_seed(nkeys.encode_seed(os.urandom(32), prefix)).public_key.decode()
    with pytest.raises(ProofInvalidError):
        protocol.parse_public_key(key)
