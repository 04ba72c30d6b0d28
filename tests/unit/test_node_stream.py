"""Reading engines: server-sent events, chunks, usage, load, and what is gathered for whole answers."""

import contextlib
import itertools
import json
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node_agent.engines import (
    EngineBusyError,
    EngineDownError,
    EngineEvent,
    EngineMalformedError,
    EngineRefusedError,
    Usage,
    openai_stream,
)
from node_agent.engines.openai_stream import EventSplitter, clean_usage, error_text, parse_chunk
from node_agent.journal import Entry, Journal
from node_agent.load import Load, parse_load
from node_agent.protocol import (
    CHOICE_DELTAS_MAX,
    PIECES_MAX,
    ChoiceDelta,
    Delta,
    End,
    ReplyReader,
    Request,
    ToolCallDelta,
)
from node_agent.relay import Relay, _Gathered, until_tick

STREAM = (
    b'data: {"a": 1}\n\n: comment\n\ndata:two\ndata: lines\nid: 7\n\n'
    b"data: \xf0\x9f\x99\x82\n\ndata: [DONE]\n\n"
)
EVENTS = [b'{"a": 1}', b"two\nlines", b"\xf0\x9f\x99\x82", b"[DONE]"]


@given(st.lists(st.integers(0, len(STREAM)), max_size=8), st.booleans())
def test_events_do_not_depend_on_how_bytes_arrive(cuts: list[int], is_crlf: bool) -> None:
    stream = STREAM.replace(b"\n", b"\r\n") if is_crlf else STREAM
    splitter = EventSplitter()
    places = [0, *sorted(cuts), len(stream)]
    events = []
    for begin, end in itertools.pairwise(places):
        events += splitter.feed(stream[begin:end])
    assert events == EVENTS


def test_events_and_streams_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_stream, "EVENT_BYTES_MAX", 100)
    with pytest.raises(EngineMalformedError):
        EventSplitter().feed(b"data: " + b"x" * 100)
    with pytest.raises(EngineMalformedError):
        EventSplitter().feed(b"data: " + b"x" * 100 + b"\n\n")
    monkeypatch.setattr(openai_stream, "STREAM_BYTES_MAX", 1000)
    splitter = EventSplitter()
    fed = itertools.accumulate(splitter.feed(b"data: 12345\n\n") for _ in range(100))
    with pytest.raises(EngineMalformedError):
        list(fed)


def test_chunk_as_vllm_sends_it() -> None:
    chunk = {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "choices": [
            {
                "index": 1,
                "delta": {
                    "content": " capital",
                    "tool_calls": [{"index": 0, "id": "c1", "type": "function", "function": {"name": "f"}}],
                },
                "logprobs": {
                    "content": [
                        {
                            "token": "a",
                            "logprob": -1,
                            "bytes": [97],
                            "top_logprobs": [{"token": "b", "logprob": -2.5}],
                        }
                    ]
                },
                "finish_reason": None,
                "token_ids": [504],
            }
        ],
        "usage": {
            "prompt_tokens": 37,
            "total_tokens": 38,
            "completion_tokens": 1,
            "prompt_tokens_details": None,
        },
        "prompt_token_ids": None,
    }
    event = parse_chunk(json.dumps(chunk).encode())
    (choice,) = event.choices
    assert (choice.index, choice.content, choice.token_ids) == (1, " capital", [504])
    assert choice.tool_calls == [ToolCallDelta(0, "c1", "f", None)]
    assert choice.logprobs[0].top[0].logprob == -2.5
    assert event.usage == Usage(37, 1, None)


def test_reasoning_under_either_name() -> None:
    for name in ("reasoning", "reasoning_content"):
        event = parse_chunk(json.dumps({"choices": [{"delta": {name: "hm"}}]}).encode())
        assert event.choices[0].reasoning == "hm"


@pytest.mark.parametrize(
    "bad", ["-1", "NaN", "Infinity", "9223372036854775808", '"3"', "1.0", "true", "null", "[]"]
)
def test_a58_nonsense_counts_are_dropped(bad: str) -> None:
    counts = f'{{"prompt_tokens": 2, "completion_tokens": {bad}}}'
    data = f'{{"choices": [{{"delta": {{"content": "a"}}}}], "usage": {counts}}}'
    event = parse_chunk(data.encode())
    assert event.usage == Usage(2, None, None)
    assert event.choices[0].content == "a"


def test_usage_of_another_shape_is_no_usage() -> None:
    for bad in (None, 3, "x", [1]):
        assert clean_usage(bad) is None
    assert clean_usage({"prompt_tokens_details": {"cached_tokens": -4}}) == Usage()


def test_error_event_is_an_engine_failure() -> None:
    with pytest.raises(EngineDownError, match="out of memory"):
        parse_chunk(b'{"error": {"message": "out of memory"}}')


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (400, EngineRefusedError), (422, EngineRefusedError), (429, EngineBusyError), (503, EngineBusyError),
        (500, EngineDownError), (200, EngineDownError), ("400", EngineDownError), ([400], EngineDownError),
        (None, EngineDownError),
    ],
)  # fmt: skip
def test_an_error_event_is_what_its_code_says(code: object, kind: type[Exception]) -> None:
    with pytest.raises(kind, match="said so"):
        parse_chunk(json.dumps({"error": {"message": "said so", "code": code}}).encode())


@given(st.binary(max_size=200))
def test_any_bytes_are_a_chunk_or_refused(data: bytes) -> None:
    with contextlib.suppress(EngineMalformedError, EngineDownError, EngineRefusedError, EngineBusyError):
        parse_chunk(data)


def test_error_texts_are_one_short_printable_line() -> None:
    assert error_text({"error": {"message": "a\r\nb\x1b[2J"}}) == "a b?[2J"
    assert error_text({"detail": "x"}) == "x"
    assert error_text({"message": {"odd": 1}}) == "no reason given"
    assert len(error_text("y" * 9000)) == 500


def test_gathered_answer_is_joined_per_choice() -> None:
    gathered = _Gathered()
    pieces = [
        (0, "He", None, [1]),
        (1, "Bo", None, [7]),
        (0, "y", "stop", [2, 3]),
        (1, "nj", None, None),
    ]
    gathered.add([EngineEvent([ChoiceDelta(0, role="assistant", content="")], prompt_token_ids=[9])])
    for index, text, finish, ids in pieces:
        gathered.add([EngineEvent([ChoiceDelta(index, content=text, finish_reason=finish, token_ids=ids)])])
    choices, prompt_ids = gathered.take()
    assert [(c.index, c.role, c.content, c.finish_reason, c.token_ids) for c in choices] == [
        (0, "assistant", "Hey", "stop", [1, 2, 3]),
        (1, None, "Bonj", None, [7]),
    ]
    assert prompt_ids == [9]
    assert gathered.is_empty


@pytest.mark.parametrize(
    "choice",
    [
        ChoiceDelta(content="a"),
        ChoiceDelta(tool_calls=[ToolCallDelta(0, arguments="a")] * (PIECES_MAX // CHOICE_DELTAS_MAX * 2)),
    ],
    ids=["words", "pieces of calls"],
)
async def test_what_a_fast_engine_said_meanwhile_goes_out_in_lawful_frames(choice: ChoiceDelta) -> None:
    said: list[ChoiceDelta] = []
    frames: list[bytes] = []

    async def chat(body: dict[str, Any], model: str) -> AsyncGenerator[list[EngineEvent], None]:
        yield [EngineEvent([choice]) for _ in range(CHOICE_DELTAS_MAX + 1)]

    async def publish(data: bytes) -> None:
        frames.append(data)

    request = Request(1, "r", "m", b"{}", True, 5_000)
    assert (await Relay(request, publish, now_ms=lambda: 0).run(chat, "m")).outcome == "ok"
    reader = ReplyReader(request.credit)
    for frame in map(reader.feed, frames):
        said += frame.choices if isinstance(frame, Delta) else []
    assert isinstance(frame, End)
    assert said == [choice] * (CHOICE_DELTAS_MAX + 1)


def test_load_is_read_leniently() -> None:
    text = """# HELP x
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 2
vllm:num_requests_running{engine="0",model_name="other"} 50
vllm:num_requests_waiting{model_name="m",engine="0"} 4.0 1700000000
vllm:num_requests_waiting_by_reason{model_name="m",reason="capacity"} 4.0
vllm:gpu_cache_usage_perc{model_name="m"} 0.25
vllm:kv_cache_usage_perc{model_name="m"} NaN
broken line {
"""
    assert parse_load(text, "m") == Load(5, 4, 250)
    assert parse_load("vllm:num_requests_running 1e300\nvllm:num_requests_waiting -4", "m") == Load(
        1_000_000, 0, 0
    )
    assert parse_load("", "m") == Load()


def test_journal_is_private_appended_and_rotated(tmp_path: Path) -> None:
    def entry(n: int) -> Entry:
        return Entry(n, f"r{n}", "m", "ok", True, 1, 2, None, 5, 9)

    for begin in (0, 50):
        journal = Journal(tmp_path, file_bytes_max=2000)
        for n in range(begin, begin + 50):
            journal.write(entry(n))
        journal.close()
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == [f"journal.jsonl{end}" for end in ("", ".1", ".2", ".3")]
    assert all(file.stat().st_size <= 2000 and file.stat().st_mode & 0o077 == 0 for file in files)
    lines = [
        json.loads(line)["time_ms"] for file in reversed(files) for line in file.read_text().splitlines()
    ]
    assert lines == list(range(lines[0], 100))


@pytest.mark.parametrize(("now_s", "left_s"), [(10.0, 0.5), (10.25, 0.25), (10.44, 0.06), (10.46, 0.54)])
def test_the_next_tick_is_a_multiple_of_the_gap_and_not_a_moment_away(now_s: float, left_s: float) -> None:
    assert until_tick(now_s, 0.5) == pytest.approx(left_s)
