"""The hot routes for the framework: the same service over ASGI, and its place in the served OpenAPI.

Under `tollway serve` the hot route answers before the framework sees the request; this route serves other
ASGI servers and tells the served OpenAPI what the hot route takes and gives.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from marketplace.gateway.answer_shapes import ChatChunkOut, ChatCompletionOut, TextCompletionOut
from marketplace.gateway.completions import CompletionRequest
from marketplace.gateway.requests import ChatRequest, InferenceRequest
from marketplace.gateway.responder import AsgiResponder
from marketplace.platform.http import RefusalOut

router: Final = APIRouter()


class _Served(Response):
    """A response that the chat service writes itself."""

    def __init__(self, request: Request) -> None:
        super().__init__()
        self._request = request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await AsgiResponder(scope, receive, send).run(self._request.app.state.chat.serve)


_REFUSAL: Final[dict[str, Any]] = {"model": RefusalOut}


def schema_of(kind: type[msgspec.Struct]) -> dict[str, Any]:
    """Give the JSON schema of a request or an answer with its parts inline, as one OpenAPI object."""
    (schema,), components = msgspec.json.schema_components([kind], ref_template="#/$defs/{name}")

    def inline(node: Any) -> Any:
        if isinstance(node, dict):
            reference = node.get("$ref")
            if reference is not None:
                return inline(components[reference.rsplit("/", 1)[1]])
            return {key: inline(value) for key, value in node.items()}
        return [inline(item) for item in node] if isinstance(node, list) else node

    found: dict[str, Any] = inline(schema)
    return found


def _documented(
    kind: type[InferenceRequest], whole: type[msgspec.Struct], chunk: type[msgspec.Struct]
) -> dict[str, Any]:
    """Give what FastAPI is told of a route it does not itself serve."""
    answer = {
        "description": "OpenAI's completion; with `stream`, server-sent events, each an `x-event-schema`, "
        "then `[DONE]`, or an error object where it breaks off. `usage` also has `cost` (dollars, decimal "
        "string), `cost_nano` and `receipt_id`.",
        "content": {
            "application/json": {"schema": schema_of(whole)},
            "text/event-stream": {"schema": {"type": "string"}, "x-event-schema": schema_of(chunk)},
        },
    }
    refused = (400, 401, 402, 403, 404, 408, 413, 429, 500, 503)
    body = {"required": True, "content": {"application/json": {"schema": schema_of(kind)}}}
    return {
        "tags": ["inference"],
        "response_class": Response,
        "responses": {200: answer, **dict.fromkeys(refused, _REFUSAL)},
        "openapi_extra": {"requestBody": body, "security": [{"key": []}]},
    }


@router.post("/v1/chat/completions", **_documented(ChatRequest, ChatCompletionOut, ChatChunkOut))
async def chat_completions(request: Request) -> Response:
    """Chat with a model; pays per token from the caller's balance."""
    return _Served(request)


@router.post("/v1/completions", **_documented(CompletionRequest, TextCompletionOut, TextCompletionOut))
async def completions(request: Request) -> Response:
    """Continue a text, without a chat template; pays per token from the caller's balance."""
    return _Served(request)
