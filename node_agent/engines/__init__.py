"""Inference engines an agent can put to work, and what may go wrong with one.

EngineError             an engine did not do what it was asked
├── EngineDownError         not reachable, died, or fell silent
├── EngineBusyError         told us to come back later (429, 503)
├── EngineRefusedError      will not serve this request, however often it is asked
└── EngineMalformedError    what it sent is not the OpenAI protocol, or passes a limit
"""

import enum
from collections.abc import AsyncGenerator
from typing import Any, Protocol

import msgspec

from node_agent.load import Load
from node_agent.protocol import ChoiceDelta


class EngineError(Exception):
    """An engine did not do what it was asked."""


class EngineDownError(EngineError):
    """Not reachable, died, or fell silent."""


class EngineBusyError(EngineError):
    """The engine has too much to do."""


class EngineRefusedError(EngineError):
    """The engine will not serve this request."""


class EngineMalformedError(EngineError):
    """The engine broke the OpenAI protocol or a limit."""


class EngineState(enum.StrEnum):
    STOPPED = "stopped"
    STARTING = "starting"
    READY = "ready"
    DOWN = "down"


class Usage(msgspec.Struct, frozen=True):
    """What the engine says it counted; None where it said nothing that makes sense."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None


class EngineEvent(msgspec.Struct):
    """One server-sent event of an engine, typed."""

    choices: list[ChoiceDelta]
    prompt_token_ids: list[int] | None = None
    usage: Usage | None = None


class Engine(Protocol):
    """One engine under the agent's care."""

    name: str
    state: EngineState
    last_error: str
    restarts: int

    async def start(self) -> None:
        """Begin; returns at once, `state` tells when it is ready."""

    async def stop(self) -> None:
        """End, leaving no process behind."""

    def chat(self, body: dict[str, Any], model: str) -> AsyncGenerator[list[EngineEvent], None]:
        """Run one chat completion; closing the generator aborts it in the engine. Raises `EngineError`."""

    async def load(self, model: str) -> Load:
        """How busy the engine is with `model`; zeros when it does not say."""
