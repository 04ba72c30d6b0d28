"""What every HTTP route shares: who is calling, how a refusal looks, where services are found.

Feature packages offer an `APIRouter` each; `marketplace.app` composes them and puts the services on
`app.state`.  A route opens its own transaction (`database.transaction`), so the commit comes before the
response's first byte.

Refusals have OpenAI's shape on every path: `{"error": {"message", "type", "param", "code"}}`.  What holds for
all routes, also those still to be written, is in `install_error_handlers`.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Final, Protocol
from uuid import UUID

from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from marketplace.platform import database
from marketplace.platform.clock import Clock
from marketplace.platform.settings import ChainsConfig, Settings

TYPE_BY_STATUS = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "insufficient_funds",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    413: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    502: "server_error",
    503: "service_unavailable",
}


class Refusal(Exception):
    """A request we decline, told to the caller in OpenAI's error shape."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, dict[str, str | None]]:
        kind = TYPE_BY_STATUS.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class ErrorOut(BaseModel):
    """OpenAI's error object."""

    message: str
    type: str
    param: str | None
    code: str | None


class RefusalOut(BaseModel):
    """Every refusal's body; for the served OpenAPI."""

    error: ErrorOut


@dataclass(frozen=True, slots=True)
class Identity:
    """Who is calling: a person, through a session or an API key."""

    person_id: UUID
    key_id: UUID | None
    """None for a session."""
    scopes: frozenset[str] = field(default_factory=frozenset)
    """`inference` (call models), `account` (read and manage one's own things), `admin`."""
    proved_at: datetime | None = None
    """When this session's person last proved who he is, by password or wallet; None for an API key."""


class Authenticator(Protocol):
    """Turns credentials into an identity; implemented by `marketplace.accounts`."""

    async def authenticate(self, request: Request) -> Identity:
        """Give the caller; raises Refusal 401 with a code that says what is wrong."""
        ...


@dataclass(frozen=True, slots=True)
class Services:
    """What routes need from the process they run in; lives on `app.state.services`."""

    engine: AsyncEngine
    settings: Settings
    chains: ChainsConfig
    clock: Clock
    authenticator: Authenticator
    replica: AsyncEngine | None = None
    """Where listings are read, if not from `engine`: a little behind it, never asked before money moves."""


AS_OF = "X-Tollway-As-Of"


@asynccontextmanager
async def listings(services: Services, response: Response | None = None) -> AsyncIterator[AsyncConnection]:
    """A fresh connection for what may be a little old: from the replica if there is one that answers.

    Tells the response's reader up to when it is complete, in the header `AS_OF`.
    """
    async with database.read(services.engine, services.replica) as (connection, as_of):
        if response is not None:
            moment = (as_of or services.clock.now()).astimezone(UTC)
            response.headers[AS_OF] = moment.isoformat(timespec="milliseconds")
        yield connection


def services(request: Request) -> Services:
    found: Services = request.app.state.services
    return found


async def _identify(request: Request) -> Identity:
    return await services(request).authenticator.authenticate(request)


def require_recent_proof(services: Services, identity: Identity) -> None:
    """Refusal 403 unless the caller proved who he is within `Settings.step_up_s` (A43).

    For what a stolen credential must not do: where money goes, and who may say so.
    """
    within = timedelta(seconds=services.settings.step_up_s)
    if within and (identity.proved_at is None or services.clock.now() > identity.proved_at + within):
        raise Refusal(
            403,
            "step_up_required",
            "prove again who you are: in a session (not with an API key), POST /api/auth/step-up with your "
            f"password or a wallet's signature, then repeat this within {services.settings.step_up_s} s",
        )


def require_another(identity: Identity, person_id: UUID) -> None:
    """Refuse (403 `own_case`) where an administrator decides what he gains by himself."""
    if identity.person_id == person_id:
        raise Refusal(403, "own_case", "this is about you: another administrator decides it")


def _require(scope: str):  # type: ignore[no-untyped-def]  # noqa: ANN202 - a FastAPI dependency factory
    async def dependency(request: Request) -> Identity:
        identity = await _identify(request)
        if scope not in identity.scopes:
            raise Refusal(403, "missing_scope", f"this credential lacks the scope {scope!r}")
        return identity

    return dependency


ServicesDep = Annotated[Services, Depends(services)]
AccountIdentity = Annotated[Identity, Depends(_require("account"))]
InferenceIdentity = Annotated[Identity, Depends(_require("inference"))]
AdminIdentity = Annotated[Identity, Depends(_require("admin"))]


_ESCAPED_NUL: Final = re.compile(rb"(?<!\\)(?:\\\\)*\\u0000")


def _nul_refusal() -> Refusal:
    return Refusal(400, "invalid_request", "the NUL character (U+0000) is not taken in any text")


class _NulInBody(StarletteHTTPException):
    """Found while a route read its body; FastAPI hands on no other exception from there."""

    def __init__(self) -> None:
        super().__init__(400)


def _body_has_nul(body: bytes | bytearray) -> bool:
    """Whether a JSON body would give a NUL, escaped or, being UTF-16 or 32, by the bytes of any character."""
    return b"\0" in body or (b"\\u0000" in body and _ESCAPED_NUL.search(body) is not None)


class _NulMiddleware:
    """Refuses NUL in path, query and body, since PostgreSQL stores no text that has one.

    A prompt may hold it: the bodies of /v1 are the inference routes' own.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        query = scope.get("query_string", b"")
        if "\0" in scope["path"] or b"%00" in query or b"\0" in query:
            refusal = _nul_refusal()
            await JSONResponse(refusal.body(), refusal.status)(scope, receive, send)
            return
        seen = bytearray()

        async def checked() -> Message:
            message = await receive()
            if message["type"] == "http.request":
                seen.extend(message.get("body", b""))
                if not message.get("more_body", False) and _body_has_nul(seen):
                    raise _NulInBody
            return message

        await self._app(scope, receive if scope["path"].startswith("/v1/") else checked, send)


_UNUSED: Final = ("HTTPValidationError", "ValidationError")


def _describe_invalid_input(app: FastAPI) -> None:
    """Let the served OpenAPI say 400 and our error object where FastAPI would say its own 422."""
    generate = app.openapi
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/RefusalOut"}}}

    def described() -> dict[str, Any]:
        schema = generate()  # the same object at every call
        components = schema.get("components", {}).get("schemas", {})
        if "HTTPValidationError" not in components:
            return schema
        for path in schema["paths"].values():
            for operation in path.values():
                answers = operation["responses"]
                if "HTTPValidationError" in str(answers.get("422")):
                    del answers["422"]
                    answers.setdefault("400", {"description": "Malformed", "content": content})
        for name in _UNUSED:
            components.pop(name, None)
        ours = RefusalOut.model_json_schema(ref_template="#/components/schemas/{model}")
        components.update(ours.pop("$defs"), RefusalOut=ours)
        return schema

    app.openapi = described  # type: ignore[method-assign]


def install_error_handlers(app: FastAPI) -> None:
    """Answer every refusal, invalid input, unknown path and error of ours in OpenAI's error shape."""
    app.add_middleware(_NulMiddleware)
    _describe_invalid_input(app)

    def answer(refusal: Refusal) -> JSONResponse:
        headers = {} if refusal.retry_after_s is None else {"Retry-After": str(refusal.retry_after_s)}
        return JSONResponse(refusal.body(), status_code=refusal.status, headers=headers)

    @app.exception_handler(Refusal)
    async def refused(request: Request, error: Refusal) -> JSONResponse:
        del request
        return answer(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        del request
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            why, at = first["ctx"]["error"], first["loc"][-1]
            return answer(Refusal(400, "invalid_json", f"the body is not JSON: {why} at character {at}"))
        where = ".".join(str(part) for part in first["loc"][1:]) or None
        return answer(Refusal(400, "invalid_request", f"{where or 'body'}: {first['msg']}", param=where))

    @app.exception_handler(StarletteHTTPException)
    async def http_error(request: Request, error: StarletteHTTPException) -> JSONResponse:
        del request
        # A 400 is FastAPI's alone: a body whose bytes are no text, or nested too deep to parse.
        codes = {400: "invalid_json", 404: "not_found", 405: "method_not_allowed"}
        return answer(
            Refusal(error.status_code, codes.get(error.status_code, "http_error"), str(error.detail))
        )

    @app.exception_handler(_NulInBody)
    async def has_nul(request: Request, error: _NulInBody) -> JSONResponse:
        del request, error
        return answer(_nul_refusal())

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        # Starlette raises the error again once this is sent, and the server logs it.
        del request, error
        return answer(Refusal(500, "internal_error", "an error of ours; it is logged"))
