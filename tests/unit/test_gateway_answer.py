"""The bytes a buyer gets, for frames a node sent."""

from __future__ import annotations

import json
import time

import msgspec
import pytest

from marketplace.gateway.answer import Answer, ChoiceUnknown, error_event
from marketplace.gateway.answer_shapes import ChatChunkOut, ChatCompletionOut, TextCompletionOut, UsageOut
from marketplace.gateway.completions import CompletionAnswer
from node_agent.protocol import ChoiceDelta, Delta, End, TokenLogprob, ToolCallDelta, TopLogprob

USAGE = UsageOut(3, 2, 5, "0.000007", 7_000, "r-1", "gateway", "ids")


def an_answer(choices: int = 1) -> Answer:
    return Answer(request_id="chatcmpl-1", model="m", created_s=1_700_000_000, choices=choices)


def test_a_stream_to_the_byte() -> None:
    answer = an_answer()
    first, last = (
        Delta(1, [ChoiceDelta(content="He")]),
        Delta(2, [ChoiceDelta(content='l"\n\u2028', finish_reason="stop")]),
    )
    answer.take(first)
    written = answer.chunk(first)
    assert not answer.is_whole
    answer.take(last)
    assert answer.is_whole
    written += answer.chunk(last, USAGE)
    head = (
        b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1700000000,'
        b'"model":"m","choices":['
    )
    assert written.split(b"\n\n") == [
        head + b'{"index":0,"delta":{"role":"assistant","content":"He"},"logprobs":null,'
        b'"finish_reason":null}]}',
        head + b'{"index":0,"delta":{"content":"l\\"\\n\xe2\x80\xa8"},"logprobs":null,'
        b'"finish_reason":"stop"}],"usage":{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5,'
        b'"cost":"0.000007","cost_nano":7000,"receipt_id":"r-1","counted_by":"gateway","counted_on":"ids"}}',
        b"",
    ]
    assert answer.usage_event(USAGE).startswith(head[:-1] + b'[],"usage":{')


PLAIN = [
    ChoiceDelta(content="b\u2028", token_ids=[1, 2]),
    ChoiceDelta(index=1, content="", token_ids=[3]),
    ChoiceDelta(content="no ids"),
]


@pytest.mark.parametrize("answer_kind", [Answer, CompletionAnswer])
def test_what_is_passed_on_is_what_would_have_been_taken_and_written(answer_kind: type[Answer]) -> None:
    passed, taken = (
        answer_kind(request_id="1", model="m", created_s=1, choices=2) for _ in ("passed on", "taken")
    )
    first = Delta(1, [ChoiceDelta(content="a"), ChoiceDelta(index=1, content="z")])
    for answer in (passed, taken):
        answer.take(first)
        answer.chunk(first)
    frame = Delta(2, PLAIN, prompt_tokens=7, completion_tokens=5)
    at_once = passed.take_plain(frame)
    taken.take(frame)
    if answer_kind is Answer:
        assert at_once == taken.chunk(frame)
        assert passed.written() == taken.written()
        assert (passed.prompt_reported, passed.completion_reported) == (7, 5)
    else:  # text completions are written with offsets, event by event
        assert at_once == b""


@pytest.mark.parametrize(
    "choice",
    [
        pytest.param(ChoiceDelta(index=1, content="a"), id="first-word-of-a-choice"),
        pytest.param(ChoiceDelta(index=2, content="a"), id="stray"),
        pytest.param(ChoiceDelta(content="a", finish_reason="stop"), id="end"),
        pytest.param(ChoiceDelta(token_ids=[1]), id="no-text"),
        pytest.param(ChoiceDelta(content="a", reasoning="b"), id="reasoning"),
        pytest.param(ChoiceDelta(content="a", tool_calls=[ToolCallDelta(0, name="f")]), id="tool-call"),
        pytest.param(ChoiceDelta(content="a", logprobs=[TokenLogprob("a", -1.0)]), id="logprobs"),
        pytest.param(None, id="nothing"),
    ],
)
def test_what_is_more_than_text_is_not_passed_on(choice: ChoiceDelta | None) -> None:
    answer = an_answer(choices=2)
    first = Delta(1, [ChoiceDelta(content="a")])
    answer.take(first)
    answer.chunk(first)
    before = answer.written()
    frame = Delta(2, [ChoiceDelta(content="b"), choice] if choice else [], prompt_tokens=9)
    assert answer.take_plain(frame) == b""
    assert answer.written() == before
    assert answer.prompt_reported is None


def test_what_comes_after_the_last_end_is_not_passed_on() -> None:
    answer = an_answer()
    frame = Delta(1, [ChoiceDelta(content="a", finish_reason="stop")])
    answer.take(frame)
    answer.chunk(frame)
    assert answer.take_plain(Delta(2, [ChoiceDelta(content="b")])) == b"", "it waits for the commit"


def test_a_whole_answer_to_the_byte() -> None:
    answer = an_answer()
    answer.take(Delta(1, [ChoiceDelta(content="Hi", finish_reason="length")]))
    answer.finish(End(2, prompt_tokens=3, completion_tokens=2))
    assert (answer.prompt_reported, answer.completion_reported) == (3, 2)
    assert json.loads(answer.completion(USAGE)) == {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": "m",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hi"},
                "logprobs": None,
                "finish_reason": "length",
            }
        ],
        "usage": {
            "prompt_tokens": 3,
            "completion_tokens": 2,
            "total_tokens": 5,
            "cost": "0.000007",
            "cost_nano": 7_000,
            "receipt_id": "r-1",
            "counted_by": "gateway",
            "counted_on": "ids",
        },
    }


def test_one_event_a_choice_and_every_choice_is_waited_for() -> None:
    answer = an_answer(choices=2)
    frame = Delta(
        1, [ChoiceDelta(index=1, content="b", finish_reason="stop"), ChoiceDelta(index=0, content="a")]
    )
    answer.take(frame)
    assert answer.chunk(frame).count(b"data: ") == 2
    assert not answer.is_whole
    answer.take(Delta(2, [ChoiceDelta(index=0, finish_reason="stop")]))
    assert answer.is_whole
    indexes = [choice["index"] for choice in json.loads(answer.completion(USAGE))["choices"]]
    assert indexes == [0, 1]


def test_a_stray_choice_adds_nothing() -> None:
    answer = an_answer()
    with pytest.raises(ChoiceUnknown):
        answer.take(Delta(1, [ChoiceDelta(content="a"), ChoiceDelta(index=1, content="b")]))
    assert answer.written() == []
    assert not answer.has_begun


def test_a_frame_of_prompt_ids_is_no_beginning() -> None:
    answer = an_answer()
    answer.take(Delta(1, [], prompt_token_ids=[1, 2], prompt_tokens=2))
    assert not answer.has_begun
    assert answer.prompt_reported == 2
    assert not answer.is_whole


def test_what_was_written_is_what_is_counted() -> None:
    answer = an_answer()
    call = ToolCallDelta(0, "id", "f", '{"a"')
    answer.take(Delta(1, [ChoiceDelta(reasoning="hm", token_ids=[1])]))
    answer.take(Delta(2, [ChoiceDelta(content="yes", token_ids=[2, 3])]))
    answer.take(Delta(3, [ChoiceDelta(tool_calls=[call], token_ids=[4])]))
    answer.take(Delta(4, [ChoiceDelta(tool_calls=[ToolCallDelta(0, arguments=":1}")], token_ids=[5])]))
    answer.take(Delta(5, [ChoiceDelta(finish_reason="stop", stop_reason="\n", token_ids=[6])]))
    (written,) = answer.written()
    assert list(written.ids) == [1, 2, 3, 4, 5, 6]
    assert (written.reasoning, written.text, list(written.calls)) == ("hm", "yes", ['f{"a":1}'])
    assert (written.has_all_ids, written.stop_reason) == (True, "\n")
    answer.take(Delta(6, [ChoiceDelta(content="without ids")]))
    assert not answer.written()[0].has_all_ids


def test_a_call_in_many_pieces_costs_what_its_pieces_cost() -> None:
    """Not what copying all that came before with each of them would: half a minute for these."""
    answer, pieces = an_answer(), 100_000
    began_s = time.process_time()
    for seq in range(1, 11):
        calls = [ToolCallDelta(0, name="f", arguments="x" * 20)] * (pieces // 10)
        answer.take(Delta(seq, [ChoiceDelta(tool_calls=calls)]))
    assert time.process_time() - began_s < 2
    (written,) = answer.written()
    assert list(written.calls) == ["f" * pieces + "x" * 20 * pieces]


def test_logprobs_keep_openais_shape() -> None:
    answer = an_answer()
    entry = TokenLogprob("Hi", -0.5, [72, 105], [TopLogprob("Hi", -0.5, [72, 105])])
    frame = Delta(1, [ChoiceDelta(content="Hi", logprobs=[entry], finish_reason="stop")])
    answer.take(frame)
    expected = {
        "content": [
            {
                "token": "Hi",
                "logprob": -0.5,
                "bytes": [72, 105],
                "top_logprobs": [{"token": "Hi", "logprob": -0.5, "bytes": [72, 105]}],
            }
        ]
    }
    assert json.loads(answer.completion(USAGE))["choices"][0]["logprobs"] == expected
    assert json.loads(answer.chunk(frame)[6:])["choices"][0]["logprobs"] == expected


def test_a_reason_we_do_not_know_is_stop() -> None:
    answer = an_answer()
    answer.take(Delta(1, [ChoiceDelta(content="", finish_reason="whatever\r\n")]))
    assert answer.finish_reason == "stop"


def test_an_error_is_one_event() -> None:
    assert error_event({"error": {"message": "a\n\nb"}}) == b'data: {"error":{"message":"a\\n\\nb"}}\n\n'


@pytest.mark.parametrize(
    ("answer_kind", "whole", "event"),
    [(Answer, ChatCompletionOut, ChatChunkOut), (CompletionAnswer, TextCompletionOut, TextCompletionOut)],
)
def test_what_is_written_has_the_shape_that_is_told(
    answer_kind: type[Answer], whole: type[msgspec.Struct], event: type[msgspec.Struct]
) -> None:
    answer = answer_kind(request_id="1", model="m", created_s=1, choices=2)
    calls = [ToolCallDelta(0, id="c", name="f", arguments="{"), ToolCallDelta(0, arguments="}")]
    rows = [TokenLogprob("a", -0.5, [97], [TopLogprob("b", -1.5, None)]), TokenLogprob("\ufffd", -0.25)]
    frames = [
        Delta(1, [ChoiceDelta(role="assistant", reasoning="hm"), ChoiceDelta(index=1, content="x")]),
        Delta(2, [ChoiceDelta(content="a\ufffd", logprobs=rows), ChoiceDelta(index=1, tool_calls=calls[:1])]),
        Delta(3, [ChoiceDelta(index=1, tool_calls=calls[1:], finish_reason="tool_calls")]),
        Delta(4, [ChoiceDelta(finish_reason="what we do not know")]),
    ]
    written = b""
    for frame in frames:
        answer.take(frame)
        written += answer.chunk(frame, USAGE if answer.is_whole else None)
    events = [line.removeprefix(b"data: ") for line in written.split(b"\n\n") if line]
    assert len(events) == 6
    for line in events:
        assert json.loads(msgspec.json.encode(msgspec.json.decode(line, type=event))) == json.loads(line)
    body = answer.completion(USAGE)
    assert json.loads(msgspec.json.encode(msgspec.json.decode(body, type=whole))) == json.loads(body)
