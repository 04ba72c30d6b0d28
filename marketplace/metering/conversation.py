"""The messages of a request as the engine hands them to the model's chat template.  Pure.

A prompt is counted exactly only if its messages go through the same hands as in the engine.  What is here
follows vLLM (`renderers/chat_utils.py`, `renderers/hf.py`, `openai/chat_completion/protocol.py`, release
0.32; `tests/integration/test_counting_against_vllm.py` compares):

* a template that loops over a message's content gets a list of text parts, any other gets one string, the
  parts joined by newlines;
* only known fields reach the template; a tool call's arguments are an object there, not a string;
* `developer` becomes `system` for a template that does not know it;
* tools are written with all their fields, null where absent.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from jinja2 import Environment, nodes

Message = Mapping[str, Any]

_BILLING_HEADER: Final = "x-anthropic-billing-header"
"""A line some clients put first into system messages; it changes with every request, so vLLM drops it."""


def conversation(messages: Sequence[Message], *, in_parts: bool, knows_developer: bool) -> list[Message]:
    """Give the template's `messages`.  `in_parts` and `knows_developer` tell what the template expects."""
    found = [_message(message, in_parts=in_parts) for message in messages]
    if not knows_developer and any(message["role"] == "developer" for message in found):
        return _one_system_message([_as_system(message) for message in found])
    return list(found)


def tools_for_template(tools: Sequence[Message] | None) -> list[Message] | None:
    """Give the template's `tools`: known fields in a fixed order."""
    if tools is None:
        return None
    return [{"type": "function", "function": _function(tool.get("function") or {})} for tool in tools]


def _function(function: Message) -> Message:
    known = {name: function.get(name) for name in ("name", "description", "parameters")}
    return known if function.get("strict") is None else {**known, "strict": function["strict"]}


def _message(message: Message, *, in_parts: bool) -> dict[str, Any]:
    role = message["role"]
    texts = _texts(message.get("content"))
    if role == "system":
        texts = [rest for text in texts if (rest := _without_billing_header(text)) is not None]
    out: dict[str, Any] = {"role": role}
    if in_parts and role != "tool":
        out["content"] = [{"type": "text", "text": text} for text in texts]
    elif in_parts:
        out["content"] = "\n".join(texts)
    else:
        out["content"] = "\n".join(text for text in texts if text)
    if role == "assistant":
        out |= _assistant_fields(message)
    elif role == "tool" and "tool_call_id" in message:
        out["tool_call_id"] = message["tool_call_id"]
    if isinstance(message.get("name"), str):
        out["name"] = message["name"]
    if role == "developer":
        out["tools"] = message.get("tools")
    return out


def _texts(content: object) -> list[str]:
    if content is None:
        return []
    if isinstance(content, list):
        return [part["text"] for part in content]
    return [str(content)]


def _without_billing_header(text: str) -> str | None:
    """Give the text after such a line, None if nothing is left."""
    return (text.partition("\n")[2] or None) if text.startswith(_BILLING_HEADER) else text


def _assistant_fields(message: Message) -> Message:
    out: dict[str, Any] = {}
    calls = message.get("tool_calls")
    if calls:
        out["tool_calls"] = [_call(call) for call in calls]
    reasoning = message.get("reasoning")
    if reasoning is None:
        reasoning = message.get("reasoning_content")
    if reasoning is not None:
        out["reasoning"] = out["reasoning_content"] = reasoning
    return out


def _call(call: Message) -> Message:
    function = call["function"]
    out = {"id": call["id"]} if "id" in call else {}
    # vLLM validates into typed dictionaries, whose fields come in this order.
    return out | {
        "function": {"arguments": _arguments(function.get("arguments")), "name": function.get("name")},
        "type": "function",
    }


def _arguments(arguments: object) -> object:
    """Give a call's arguments as an object; what is none becomes an empty one."""
    if isinstance(arguments, str) and arguments:
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return {}
    return arguments if isinstance(arguments, dict) else {}


def _as_system(message: Message) -> Message:
    if message["role"] != "developer":
        return message
    return {name: value for name, value in message.items() if name != "tools"} | {"role": "system"}


def _one_system_message(messages: Sequence[Message]) -> list[Message]:
    """Join all system messages into a first one, unless there is just one and it is the first."""
    system = [message for message in messages if message["role"] == "system"]
    if len(system) == 1 and messages[0] is system[0]:
        return list(messages)
    texts = [text for message in system if (text := "\n".join(_texts(message["content"])))]
    others = [message for message in messages if message["role"] != "system"]
    return [{"role": "system", "content": "\n\n".join(texts)}, *others]


# ---- what a template expects


def knows_developer(template: str) -> bool:
    """Tell whether a template speaks of the role `developer`."""
    return '"developer"' in template or "'developer'" in template


def wants_parts(environment: Environment, template: str) -> bool:
    """Tell whether a template loops over a message's content, as templates for images do.

    Such a loop runs over `message.content`, over a variable named `content`, or, in a macro, over the
    parameter that is called with a message's content.
    """
    tree = environment.parse(template)
    try:
        messages = set(_message_names(tree))
        return any(_is_content_loop(loop, tree, messages) for loop in tree.find_all(nodes.For))
    except _NotAName:
        return False


class _NotAName(Exception):
    """An assignment to something other than a name, before which vLLM's detection gives up too."""


def _name_of(node: nodes.Node) -> str:
    if not isinstance(node, nodes.Name):
        raise _NotAName
    return node.name


def _is_access(node: nodes.Node | None, variable: str, key: str | None = None) -> bool:
    """Tell whether a node reads `variable` (or its `key`), through any filters, tests and slices."""
    if isinstance(node, nodes.Filter | nodes.Test):
        return _is_access(node.node, variable, key)
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
        return _is_access(node.node, variable, key)
    if key is None:
        return isinstance(node, nodes.Name) and node.ctx == "load" and node.name == variable
    if isinstance(node, nodes.Getitem):
        is_key = isinstance(node.arg, nodes.Const) and node.arg.value == key
        return is_key and _is_access(node.node, variable) and isinstance(node.node, nodes.Name)
    return isinstance(node, nodes.Getattr) and node.attr == key and isinstance(node.node, nodes.Name) and (
        _is_access(node.node, variable)
    )  # fmt: skip


def _message_names(tree: nodes.Template) -> Iterator[str]:
    """Give the names loops over `messages`, or over something made of them, give to one message."""
    lists, waiting = ["messages"], deque(["messages"])
    while waiting:
        variable = waiting.popleft()
        for assignment in tree.find_all(nodes.Assign):
            if _is_access(assignment.node, variable):
                name = _name_of(assignment.target)
                if name not in lists:
                    lists.append(name)
                    waiting.append(name)
    for loop in tree.find_all(nodes.For):
        if any(_is_access(loop.iter, variable) for variable in lists):
            yield _name_of(loop.target)


def _is_content_loop(loop: nodes.For, tree: nodes.Template, messages: set[str]) -> bool:
    if any(_is_access(loop.iter, message, "content") for message in messages):
        return True
    if not isinstance(loop.iter, nodes.Name):
        return False
    macro = next((m for m in tree.find_all(nodes.Macro) if loop in m.find_all(nodes.For)), None)
    if macro is None:
        return loop.iter.name == "content"
    return loop.iter.name in _content_parameters(macro, tree, messages)


def _content_parameters(macro: nodes.Macro, tree: nodes.Template, messages: set[str]) -> set[str]:
    """Give the parameters of a macro that some call fills with a message's content."""
    found = set()
    for call in tree.find_all(nodes.Call):
        if not isinstance(call.node, nodes.Name) or call.node.name != macro.name:
            continue
        by_place = zip(macro.args, call.args, strict=False)
        given = [(parameter.name, value) for parameter, value in by_place]
        given += [(keyword.key, keyword.value) for keyword in call.kwargs]
        found |= {
            name
            for name, value in given
            if any(_is_access(value, message, "content") for message in messages)
        }
    return found
