"""Which ids are believed, and what a prompt looks like to a template."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from letters import CHATML, letters_tokenizer, prompt_tokens
from tokenizers import pre_tokenizers

from marketplace.metering import counting
from marketplace.metering.conversation import conversation, tools_for_template, wants_parts
from marketplace.metering.counting import PromptRefused, TokenCounter, Written, _environment

END = 257
LOOP = "{%% for c in %s %%}{%% endfor %%}"
MACRO = f"{{% macro s(x) %}}{LOOP % 'x'}{{% endmacro %}}"


def _counter(template: str = CHATML) -> TokenCounter:
    return TokenCounter(
        tokenizer=letters_tokenizer().to_str().encode(),
        chat_template=template,
        special_tokens={"bos_token": "<s>"},
    )


@pytest.fixture(scope="module")
def counter() -> TokenCounter:
    return _counter()


def ids(text: str) -> list[int]:
    return list(letters_tokenizer().encode(text, add_special_tokens=False).ids)


def test_a_prompt_is_counted_with_its_template(counter: TokenCounter) -> None:
    assert len(counter.prompt_ids([{"role": "user", "content": "Hi"}])) == prompt_tokens("Hi")
    assert len(counter.prompt_ids([{"role": "user", "content": "é😀"}])) == prompt_tokens("é😀")


@given(
    st.lists(st.sampled_from(["Hi", " ", "\n", "é", "<|im_start|>", "<|im_end|>", "<|im_", "7", "user\n"]))
)
def test_parts_add_up_to_the_whole_prompt(pieces: list[str]) -> None:
    counter = _shared()
    messages = [{"role": "user", "content": "".join(pieces)}]
    whole = len(counter.prompt_ids(messages))
    assert counter.prompt_tokens(messages, owner=b"a") == whole
    assert counter.prompt_tokens(messages, owner=b"a") == whole  # as remembered


def test_a_tokenizer_that_does_not_begin_anew_after_its_marks_counts_whole_prompts() -> None:
    tokenizer = letters_tokenizer()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="first"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    files = tokenizer.to_str().encode()
    counter = TokenCounter(tokenizer=files, chat_template=CHATML, special_tokens={})
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "you"}]
    assert counter.prompt_tokens(messages, owner=b"") == len(counter.prompt_ids(messages))
    assert [*counter._parts._parts_of("a<|im_end|>b")] == ["a<|im_end|>b"]


def test_what_one_buyer_sent_is_not_remembered_for_another_and_not_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(counting, "PARTS_MAX", 4)
    parts = counting.CountedParts(letters_tokenizer())
    for owner in (b"a", b"b", b"a"):
        parts.tokens("Hi<|im_end|>there", owner)
    assert len(parts._counts) == 4
    parts.tokens("more", b"c")
    assert len(parts._counts) == 4


@cache
def _shared() -> TokenCounter:
    return _counter()


def test_a_tokenizer_file_that_truncates_is_not_obeyed() -> None:
    tokenizer = letters_tokenizer()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=100)
    counter = TokenCounter(tokenizer=tokenizer.to_str().encode(), chat_template=CHATML, special_tokens={})
    assert len(counter.prompt_ids([{"role": "user", "content": "Hi"}])) == prompt_tokens("Hi")


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (Written(ids("Hello"), "Hello"), 5),
        (Written([*ids("Hello"), END], "Hello"), 6),  # the end of the turn is sampled
        (Written([END], ""), 1),
        (Written([], ""), 0),
        (Written(ids(" Hello"), "Hello"), 6),  # a decoder that drops a leading space
        (Written(ids("Hé")[:-1], "H"), 2),  # the half character is withheld
        (Written(ids("Hello") + ids("!") * 9, "Hello"), 5),  # more than was delivered
        (Written([*ids("Hello"), *[END] * 30], "Hello"), 5),  # specials are no text, and no proof
        (Written(ids("Hello") + ids("é")[:1] * 30, "Hello"), 5),
        (Written(ids("other"), "Hello"), 5),
        (Written([*ids("Hello"), 10**6], "Hello"), 6),  # an unknown id says nothing
        (Written(ids("Hello"), "Hello", has_all_ids=False), 5),
        (Written(ids("Hi"), "Hello", has_all_ids=False), 5),
    ],
)
def test_ids_count_if_they_say_the_text(counter: TokenCounter, written: Written, expected: int) -> None:
    assert counter.completion_tokens(written)[0] == expected


def test_a_stop_string_counts_up_to_its_last_token(counter: TokenCounter) -> None:
    stopped = Written(ids("one, "), "one", stop_reason=", ")
    assert counter.completion_tokens(stopped, stops=[", "])[0] == 5
    assert counter.completion_tokens(stopped, stops=["?"])[0] == 3  # nobody asked for that
    too_long = Written(ids("one, two"), "one", stop_reason=", ")
    assert counter.completion_tokens(too_long, stops=[", "])[0] == 3
    by_token = Written([*ids("one"), 5], "one", stop_reason=5)
    assert counter.completion_tokens(by_token)[0] == 4
    assert counter.completion_tokens(Written(ids("one more"), "one", stop_reason=5))[0] == 3


def test_many_marks_and_pieces_are_believed_only_of_who_goes_on_after_the_end(counter: TokenCounter) -> None:
    written = Written([*ids("Hi"), *[END] * 40], "Hi")
    assert counter.completion_tokens(written)[0] == 2
    assert counter.completion_tokens(written, ignores_end=True)[0] == 42
    pieces = Written(ids("Hi") + ids("é")[:1] * 40, "Hi")  # which no engine can show
    assert counter.completion_tokens(pieces)[0] == 2
    assert counter.completion_tokens(pieces, ignores_end=True)[0] == 42
    assert counter.completion_tokens(Written(ids("Hi, more"), "Hi"), ignores_end=True)[0] == 2


def test_reasoning_and_calls_count_with_their_marks(counter: TokenCounter) -> None:
    thought = "<think>\nhm\n</think>\n\nyes"
    written = Written(ids(thought), "yes", reasoning="hm")
    assert counter.completion_tokens(written)[0] == len(thought)
    call = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
    written = Written(ids(call), "", calls=['f{"a": 1}'])
    assert counter.completion_tokens(written)[0] == len(call)
    padded = Written(ids(call + " " * 500), "", calls=['f{"a": 1}'])
    assert counter.completion_tokens(padded)[0] == len('f{"a": 1}')
    other = Written(ids("<think>something else"), "yes", reasoning="hm")
    assert counter.completion_tokens(other)[0] == len("hmyes")


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no') }}",
        "{{ messages[9].content }}{{ messages[9].content.x }}",
        "{{ messages + 1 }}",
        "{{ 1 / 0 }}",
        "{% for m in messages %}{{ m.content.__class__.__mro__ }}{% endfor %}",
        "{{ messages.append(1) }}",
    ],
)
def test_what_a_template_refuses_is_the_buyers_to_hear(template: str) -> None:
    with pytest.raises(PromptRefused):
        _counter(template).prompt([{"role": "user", "content": "Hi"}])


def test_template_text_in_a_message_is_only_text(counter: TokenCounter) -> None:
    assert "{{ 7 * 7 }}" in counter.prompt([{"role": "user", "content": "{{ 7 * 7 }}"}])


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", False),
        (f"{{% for m in messages %}}{LOOP % 'm.content'}{{% endfor %}}", True),
        (f"{{% for m in messages[1:] %}}{LOOP % 'm.content | list'}{{% endfor %}}", True),
        (f"{{% set rest = messages %}}{{% for m in rest %}}{LOOP % 'm.content'}{{% endfor %}}", True),
        (f"{{% for m in messages %}}{{% set content = m.content %}}{LOOP % 'content'}{{% endfor %}}", True),
        (f"{MACRO}{{% for m in messages %}}{{{{ s(m.content) }}}}{{% endfor %}}", True),
        (f"{MACRO}{{% for m in messages %}}{{{{ s(x=m.content) }}}}{{% endfor %}}", True),
        (f"{MACRO}{{% for m in messages %}}{{{{ s(m.tools) }}}}{{% endfor %}}", False),
        (f"{{% for m in messages %}}{LOOP % 'm.tool_calls'}{{% endfor %}}", False),
        (f"{{% set a, b = 1, 2 %}}{{% for m in messages %}}{LOOP % 'm.content'}{{% endfor %}}", True),
    ],
)
def test_templates_that_want_parts_are_known(template: str, expected: bool) -> None:
    assert wants_parts(_environment(), template) is expected


def test_messages_are_what_the_engine_makes_of_them() -> None:
    messages = [
        {"role": "system", "content": "a"},
        {"role": "user", "content": [{"type": "text", "text": "b"}, {"type": "text", "text": ""}]},
        {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "[]"}}]},
        {"role": "developer", "content": "c", "tools": []},
    ]
    plain = conversation(messages, in_parts=False, knows_developer=False)
    assert plain == [
        {"role": "system", "content": "a\n\nc"},
        {"role": "user", "content": "b"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "1", "function": {"arguments": {}, "name": "f"}, "type": "function"}],
        },
    ]
    parts = conversation(messages[1:2], in_parts=True, knows_developer=True)
    assert parts[0]["content"] == [{"type": "text", "text": "b"}, {"type": "text", "text": ""}]
    assert tools_for_template([{"function": {"name": "f", "x": 1}}]) == [
        {"type": "function", "function": {"name": "f", "description": None, "parameters": None}}
    ]


TINY = Path(__file__).parents[2] / ".engine" / "models" / "tiny"


@pytest.mark.engine  # not for its server: for the model's files
@pytest.mark.skipif(not TINY.exists(), reason="the engine's models are not built")
def test_the_tiny_models_own_files_count() -> None:
    from marketplace.catalog.models import read_model_folder

    files, context = read_model_folder(TINY)
    counter = TokenCounter(
        tokenizer=files.tokenizer, chat_template=files.chat_template, special_tokens=files.special_tokens
    )
    assert context == 4096
    assert counter.prompt([{"role": "user", "content": "Hi"}]) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    text = "def é(self):\n    return None"
    sampled = counter._tokenizer.encode(text).ids
    assert counter.completion_tokens(Written(sampled, text))[0] == len(sampled)
