"""What all management routes answer alike: to NUL, broken JSON, errors of ours; and what OpenAPI says."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from pydantic import BaseModel
from starlette.requests import Request

from marketplace.app import ROUTERS
from marketplace.platform.http import install_error_handlers


class Said(BaseModel):
    text: str


@pytest.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    app = FastAPI()

    @app.get("/api/said/{name}")
    async def said(name: str, text: str = "") -> str:
        return name + text

    @app.post("/api/say")
    async def say(asked: Said) -> str:
        return asked.text

    @app.post("/api/raw")
    @app.post("/v1/raw")
    async def raw(request: Request) -> int:
        return len(await request.body())

    @app.get("/api/broken")
    async def broken() -> None:
        raise RuntimeError("secret")

    install_error_handlers(app)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://tollway") as client:
        yield client


def code_of(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


JSON = {"content-type": "application/json"}
INVALID = (400, "invalid_request")


@pytest.mark.parametrize("path", ["/api/said/a%00", "/api/said/a?text=%00", "/api/said/a?other=b%00", "/%00"])
async def test_no_nul_in_an_address(http: httpx.AsyncClient, path: str) -> None:
    assert code_of(await http.get(path)) == INVALID


@pytest.mark.parametrize(
    "body",
    [
        rb'{"text": "a\u0000b"}',
        rb'{"text": "a\\\u0000b"}',
        rb'{"text": "a", "\u0000": 1}',
        rb'{"text": "a", "more": [{"deep": "\u0000"}]}',
        b'{"text": "a\x00b"}',
        json.dumps({"text": "a\0"}).encode("utf-16"),
        json.dumps({"text": "a\0"}).encode("utf-32-le"),
    ],
)
@pytest.mark.parametrize("path", ["/api/say", "/api/raw"])
async def test_no_nul_in_a_body_whoever_reads_it(http: httpx.AsyncClient, path: str, body: bytes) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for byte in body:
            yield bytes([byte])

    assert code_of(await http.post(path, content=body, headers=JSON)) == INVALID
    assert code_of(await http.post(path, content=pieces(), headers=JSON)) == INVALID


async def test_what_only_looks_like_nul_is_taken(http: httpx.AsyncClient) -> None:
    for text in (r"\u0000", r"\\u0000", r"a\\\u0000", "%00", "\u0001", "\u2400"):
        answer = await http.post("/api/say", json={"text": text})
        assert (answer.status_code, answer.json()) == (200, text)
    answer = await http.get("/api/said/a%2500?text=%2500")
    assert (answer.status_code, answer.json()) == (200, "a%00%00")
    many = b'{"text": "' + rb"\\" * 500_000 + rb'u0000"}'  # in linear time
    assert (await http.post("/api/say", content=many, headers=JSON)).status_code == 200


async def test_a_prompt_may_hold_nul(http: httpx.AsyncClient) -> None:
    assert (await http.post("/v1/raw", content=rb'"\u0000"')).json() == 8


@pytest.mark.parametrize("body", [b"{", b"", b"nonsense", b'{"text": "\xff"}', b"[" * 200_000])
async def test_a_body_that_is_no_json(http: httpx.AsyncClient, body: bytes) -> None:
    answer = await http.post("/api/say", content=body, headers=JSON)
    assert code_of(answer) == ((400, "invalid_json") if body else INVALID)
    assert answer.json()["error"]["param"] is None
    if body == b"{":
        assert "Expecting property name" in answer.json()["error"]["message"]


async def test_an_error_of_ours_has_the_shape_of_all_and_goes_on_to_the_server(
    http: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    """The server logs what it is given; nothing of it is told."""
    caplog.set_level(logging.DEBUG)
    answer = await http.get("/api/broken")
    assert code_of(answer) == (500, "internal_error")
    assert answer.json()["error"]["type"] == "server_error"
    assert "secret" not in answer.text + caplog.text
    transport = httpx.ASGITransport(http._transport.app)  # type: ignore[attr-defined]
    async with httpx.AsyncClient(transport=transport, base_url="http://tollway") as strict:
        with pytest.raises(RuntimeError, match="secret"):
            await strict.get("/api/broken")


def _operations(schema: dict[str, Any]) -> dict[str, Any]:
    return {
        f"{method} {path}": operation["responses"]
        for path, methods in schema["paths"].items()
        for method, operation in methods.items()
    }


def test_openapi_says_400_where_the_framework_would_say_422() -> None:
    app, plain = FastAPI(), FastAPI()
    for router in ROUTERS:
        app.include_router(router)
        plain.include_router(router)
    install_error_handlers(app)
    told, default = _operations(app.openapi()), _operations(plain.openapi())
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/RefusalOut"}}}
    replaced = {name for name, answers in default.items() if "HTTPValidationError" in str(answers)}
    assert len(replaced) > 30
    for name, answers in told.items():
        assert answers.keys() == (
            default[name].keys() - {"422"} | {"400"} if name in replaced else default[name].keys()
        )
        if name in replaced:
            assert answers["400"]["content"] == error, name
    assert "422" in told["post /api/withdrawals"]  # the project's own stay
    assert app.openapi() == app.openapi()
    components = app.openapi()["components"]["schemas"]
    assert "ValidationError" not in str(app.openapi())
    kept = plain.openapi()["components"]["schemas"]
    assert components == {
        name: kept[name] for name in kept.keys() - {"HTTPValidationError", "ValidationError"}
    }


def test_openapi_has_the_error_object_even_where_no_route_names_it() -> None:
    app = FastAPI()

    @app.get("/api/said")
    async def said(text: str) -> str:
        return text

    install_error_handlers(app)
    assert app.openapi()["components"]["schemas"].keys() == {"RefusalOut", "ErrorOut"}
