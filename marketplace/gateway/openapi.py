"""`POST /v1/chat/completions` for the framework: the same service over ASGI, and its place in OpenAPI.

Under `tollway serve` the hot route answers before the framework sees the request; this route serves other
ASGI servers and tells the served OpenAPI what the hot route takes and gives.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from marketplace.gateway.requests import BODY_BYTES_MAX, ChatRequest
from marketplace.gateway.responder import AsgiResponder
from marketplace.platform.http import RefusalOut

router: Final = APIRouter()


class _Served(Response):
    """A response that the chat service writes itself."""

    def __init__(self, request: Request, body: bytes) -> None:
        super().__init__()
        self._request = request
        self._body = body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        responder = AsgiResponder(scope, self._body)
        serving = asyncio.create_task(self._request.app.state.chat.serve(responder))
        await responder.run(receive, send)
        await serving


_REFUSAL: Final[dict[str, Any]] = {"model": RefusalOut}
_ANSWER: Final[dict[str, Any]] = {
    "description": "OpenAI's chat completion (or, with `stream`, server-sent events of its chunks). `usage` also "
    "has `cost` (dollars, decimal string), `cost_nano` and `receipt_id`.",
    "content": {
        "application/json": {"schema": {"type": "object"}},
        "text/event-stream": {"schema": {"type": "string"}},
    },
}


def _request_schema() -> dict[str, Any]:
    """Give the request's JSON schema with its parts inline, as one OpenAPI object."""
    (schema,), components = msgspec.json.schema_components([ChatRequest], ref_template="#/$defs/{name}")

    def inline(node: Any) -> Any:
        if isinstance(node, dict):
            reference = node.get("$ref")
            if reference is not None:
                return inline(components[reference.rsplit("/", 1)[1]])
            return {key: inline(value) for key, value in node.items()}
        return [inline(item) for item in node] if isinstance(node, list) else node

    found: dict[str, Any] = inline(schema)
    return found


@router.post(
    "/v1/chat/completions",
    tags=["inference"],
    response_class=Response,
    responses={200: _ANSWER, **dict.fromkeys((400, 401, 402, 403, 404, 413, 429, 500, 502, 503), _REFUSAL)},
    openapi_extra={
        "requestBody": {"required": True, "content": {"application/json": {"schema": _request_schema()}}}
    },
)
async def chat_completions(request: Request) -> Response:
    """Chat with a model; pays per token from the caller's balance."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > BODY_BYTES_MAX:
            break
    return _Served(request, bytes(body))
