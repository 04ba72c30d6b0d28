"""Rate limits (R22): how often a person, or an address, may ask.

Windows slide and are exact: in no stretch of `window_s` seconds does a key get more than `requests`.
People, and attempts to sign in, are counted over all processes together (`SharedLimits`, over
`platform.allotments`); other requests by address are counted in each process (`RateLimits`: no I/O, a
microsecond, bounded in number), where N processes allow up to N times as much.

Who is counted: the person of a credential that works, else the client's address, which is the socket's
peer unless that peer is a trusted proxy (A84).
"""

from __future__ import annotations

import ipaddress
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from math import ceil
from types import MappingProxyType
from typing import Final, NamedTuple
from uuid import UUID

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from marketplace.platform.allotments import MINUTE_MS, Allotments, AllotmentsUnavailable, Ceiling, Refused
from marketplace.platform.http import Refusal

COUNTERS_MAX: Final = 20_000
"""Per rule; a counter at 60 a minute takes up to 2 kB, so at most 40 MB a rule."""
FORWARDED_MAX: Final = 2_000
"""Characters of X-Forwarded-For that are read at all."""


class Rule(StrEnum):
    """What is limited."""

    CHAT = "chat"
    MODELS = "models"
    KEYS = "keys"
    AUTHENTICATION = "authentication"
    """Registering, logging in, answering a wallet challenge; always counted by address."""
    UNAUTHENTICATED = "unauthenticated"
    """Requests without a credential that works, by address, on top of their own rule (A78)."""
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class Limit:
    """At most `requests` in any `window_s` seconds."""

    requests: int
    window_s: int

    def __post_init__(self) -> None:
        if self.requests < 1 or self.window_s < 1:
            raise ValueError("a limit allows at least one request in at least one second")


DEFAULT_LIMITS: Final[Mapping[Rule, Limit]] = MappingProxyType(
    {
        Rule.CHAT: Limit(60, 60),
        Rule.MODELS: Limit(30, 60),
        Rule.KEYS: Limit(20, 60),
        Rule.AUTHENTICATION: Limit(5, 15 * 60),
        Rule.UNAUTHENTICATED: Limit(60, 60),
        Rule.OTHER: Limit(300, 60),
    }
)
DEVELOPMENT_LIMITS: Final[Mapping[Rule, Limit]] = MappingProxyType(
    {rule: Limit(100 * limit.requests, limit.window_s) for rule, limit in DEFAULT_LIMITS.items()}
)
"""For one machine where one address plays every part (the demo, end-to-end tests)."""


@dataclass(frozen=True, slots=True)
class Allowance:
    """What an account or a key may use; None: no limit of its own."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    parallel_requests: int | None = None
    spend_nano_per_day: int | None = None
    models: frozenset[str] | None = None


NO_ALLOWANCE: Final = Allowance()


class Taken(NamedTuple):
    """The answer to one request for a place."""

    allowed: bool
    limit: int
    remaining: int
    """How many more are allowed now."""
    reset_s: int
    """Whole seconds until the oldest counted request leaves the window; then a refused one may retry."""

    def headers(self) -> list[tuple[bytes, bytes]]:
        """X-RateLimit-*, and Retry-After when refused; lower-case names, as ASGI wants."""
        lines = [
            (b"x-ratelimit-limit", b"%d" % self.limit),
            (b"x-ratelimit-remaining", b"%d" % self.remaining),
            (b"x-ratelimit-reset", b"%d" % self.reset_s),
        ]
        return lines if self.allowed else [*lines, (b"retry-after", b"%d" % self.reset_s)]

    def refusal(self) -> Refusal:
        return Refusal(
            429,
            "rate_limit_exceeded",
            f"rate limit of {self.limit} requests reached; try again in {self.reset_s} s",
            retry_after_s=self.reset_s,
        )


class _Counters:
    """One rule's counters: per key, the times of the requests let through, oldest key first."""

    __slots__ = ("limit", "times")

    def __init__(self, limit: Limit) -> None:
        self.limit = limit
        self.times: OrderedDict[Hashable, deque[float]] = OrderedDict()

    def start(self, key: Hashable) -> deque[float]:
        """Make a counter; the oldest gives way when there are too many."""
        if len(self.times) >= COUNTERS_MAX:
            self.times.popitem(last=False)
        times: deque[float] = deque()
        self.times[key] = times
        return times


class RateLimits:
    """The counters of one process."""

    def __init__(
        self,
        monotonic: Callable[[], float],
        limits: Mapping[Rule, Limit] = DEFAULT_LIMITS,
        overrides: Mapping[Hashable, Mapping[Rule, Limit]] | None = None,
    ) -> None:
        """`monotonic` gives seconds (Clock.monotonic); `overrides` are per person, read at each request."""
        self._monotonic = monotonic
        self._counters = {rule: _Counters(limits.get(rule, DEFAULT_LIMITS[rule])) for rule in Rule}
        self._overrides = {} if overrides is None else overrides

    def take(self, rule: Rule, key: Hashable) -> Taken:
        """Count one request of `key` (a person's id or an address) if it is within the limit."""
        counters = self._counters[rule]
        limit = counters.limit
        if self._overrides and key in self._overrides:
            limit = self._overrides[key].get(rule, limit)
        now = self._monotonic()
        horizon, most = now - limit.window_s, limit.requests
        times = counters.times.get(key)
        if times is None:
            times = counters.start(key)
        while times and times[0] <= horizon:
            times.popleft()
        used = len(times)
        if used >= most:  # more than `most` only where an override has just been tightened
            return Taken(False, most, 0, ceil(times[used - most] - horizon))
        times.append(now)
        return Taken(True, most, most - used - 1, ceil(times[0] - horizon))

    async def count(self, rule: Rule, key: Hashable) -> Taken:
        """As `take`; what the middleware calls."""
        return self.take(rule, key)

    def counters(self, rule: Rule) -> int:
        """How many counters `rule` has: at most COUNTERS_MAX."""
        return len(self._counters[rule].times)


class SharedLimits:
    """`RateLimits`, and for people and sign-ins over all processes together."""

    def __init__(
        self, local: RateLimits, allotments: Allotments, limits: Mapping[Rule, Limit] = DEFAULT_LIMITS
    ) -> None:
        self._local = local
        self._allotments = allotments
        self._ceilings = {
            rule: Ceiling(rule.value, limit.requests, limit.window_s * 1000)
            for rule, limit in ((rule, limits.get(rule, DEFAULT_LIMITS[rule])) for rule in Rule)
        }

    def take(self, rule: Rule, key: Hashable) -> Taken:
        """Count a request in this process alone, as `RateLimits.take`."""
        return self._local.take(rule, key)

    async def count(
        self, rule: Rule, key: Hashable, requests: int | None = None, *, subject: str | None = None
    ) -> Taken:
        """Count one request of `key`; `requests` a minute in place of the rule's own limit.

        Without the database, requests are counted in this process alone.
        """
        is_person = isinstance(key, UUID)
        if not is_person and rule is not Rule.AUTHENTICATION:
            return self._local.take(rule, key)
        ceiling = self._ceilings[rule]
        if requests is not None:
            ceiling = Ceiling(ceiling.rule, requests, MINUTE_MS)
        name = subject or (f"person:{key}" if is_person else f"address:{key}")
        try:
            grant = self._allotments.take_now(name, ceiling) or await self._allotments.take(name, ceiling)
        except AllotmentsUnavailable:
            return self._local.take(rule, key)
        if isinstance(grant, Refused):
            return Taken(False, ceiling.units, 0, max(1, grant.wait_s))
        left, reset_s = self._allotments.left(name, ceiling)
        return Taken(True, ceiling.units, left, reset_s)


def _parse(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        found = ipaddress.ip_address(text.strip())
    except ValueError:
        return None
    if isinstance(found, ipaddress.IPv6Address) and found.ipv4_mapped is not None:
        return found.ipv4_mapped
    return found


def client_address(peer: str, forwarded_for: str | None, trusted_proxies: frozenset[str]) -> str:
    """Give the address a request is counted under.

    The socket's peer, unless it is a trusted proxy: then the rightmost address of X-Forwarded-For that is
    not itself a trusted proxy; what lies left of it is the client's own word.  An IPv6 client is counted
    by its /64, of which it has every address.
    """
    found = _parse(peer)
    if forwarded_for is not None and peer in trusted_proxies:
        for hop in reversed(forwarded_for[-FORWARDED_MAX:].split(",")):
            address = _parse(hop)
            if address is None:
                break  # what the last proxy wrote is unreadable: count the proxy
            found = address
            if str(address) not in trusted_proxies:
                break
    if found is None:
        return peer
    if isinstance(found, ipaddress.IPv6Address):
        return str(ipaddress.IPv6Network((found, 64), strict=False))
    return str(found)


_ATTEMPTS: Final = frozenset(
    {"/api/auth/register", "/api/auth/login", "/api/auth/wallet/verify", "/api/auth/step-up"}
)


def rule_of(path: str) -> Rule | None:
    """Give the rule of a path; None where nothing is limited."""
    if path.startswith("/v1/"):
        return Rule.MODELS if path == "/v1/models" or path.startswith("/v1/models/") else Rule.CHAT
    if not path.startswith("/api/"):
        return None
    if path in _ATTEMPTS:
        return Rule.AUTHENTICATION
    return Rule.KEYS if path == "/api/keys" or path.startswith("/api/keys/") else Rule.OTHER


class RateLimitMiddleware:
    """Counts each request under /api and /v1, tells its caller where he stands, refuses with 429.

    `person_of` names the person of a credential without I/O, or None (`AccountAuthenticator.person_of`).
    """

    def __init__(
        self,
        app: ASGIApp,
        limits: RateLimits | SharedLimits,
        *,
        trusted_proxies: frozenset[str] = frozenset(),
        person_of: Callable[[str], UUID | None] = lambda _: None,
    ) -> None:
        self._app = app
        self._limits = limits
        self._trusted_proxies = trusted_proxies
        self._person_of = person_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        rule = rule_of(scope["path"]) if scope["type"] == "http" else None
        if rule is None:
            await self._app(scope, receive, send)
            return
        taken = await self._take(rule, scope)
        lines = taken.headers()

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in lines:
                    headers[name.decode()] = value.decode()
            await send(message)

        if taken.allowed:
            await self._app(scope, receive, counted)
        else:
            refusal = taken.refusal()
            await JSONResponse(refusal.body(), refusal.status)(scope, receive, counted)

    async def _take(self, rule: Rule, scope: Scope) -> Taken:
        headers = Headers(scope=scope)
        authorization = headers.get("authorization", "")
        person = (
            self._person_of(authorization[7:].strip()) if authorization[:7].lower() == "bearer " else None
        )
        if person is not None and rule is not Rule.AUTHENTICATION:
            return await self._limits.count(rule, person)
        client = scope.get("client")
        forwarded = ",".join(headers.getlist("x-forwarded-for")) or None
        address = client_address(client[0] if client else "", forwarded, self._trusted_proxies)
        taken = await self._limits.count(rule, address)
        if person is not None or not taken.allowed:
            return taken
        anonymous = await self._limits.count(Rule.UNAUTHENTICATED, address)
        return taken if anonymous.allowed else anonymous
