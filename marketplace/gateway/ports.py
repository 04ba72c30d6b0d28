"""What the gateway needs of packages it does not import; `marketplace.app` brings them together."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from typing import Protocol, TypeVar
from uuid import UUID

from marketplace.platform.limits import Allowance

Counter_co = TypeVar("Counter_co", covariant=True)


class KeyFacts(Protocol):
    """What an API key is allowed."""

    @property
    def key_id(self) -> UUID: ...
    @property
    def person_id(self) -> UUID: ...
    @property
    def scopes(self) -> frozenset[str]: ...
    @property
    def allowance(self) -> Allowance: ...
    @property
    def account(self) -> Allowance: ...


class Keys(Protocol):
    """API keys in memory, never older than five seconds."""

    @property
    def is_fresh(self) -> bool: ...

    def lookup(self, presented: str) -> KeyFacts | None: ...

    async def find(self, presented: str) -> KeyFacts | None: ...


class ModelFacts(Protocol):
    """What serving needs of a catalogue entry."""

    @property
    def name(self) -> str: ...
    @property
    def context(self) -> int: ...
    @property
    def created_s(self) -> int: ...


class Shelf(Protocol[Counter_co]):
    """The catalogue in memory."""

    def model(self, name: str) -> ModelFacts | None: ...

    def resolve(self, name: str) -> Sequence[ModelFacts]: ...

    def models(self) -> Sequence[ModelFacts]: ...

    async def counter_of(self, name: str) -> Counter_co: ...


class LedgerAccounts(Protocol):
    """Ledger account ids of people, remembered after their first use."""

    def buyer(self, person_id: UUID) -> Awaitable[int]: ...

    def operator(self, person_id: UUID) -> Awaitable[int]: ...
