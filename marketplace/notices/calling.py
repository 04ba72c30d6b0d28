"""Calling a webhook that a stranger named: how not to be sent into our own house (A69).

    the address     https, port 443, a host; no user, password or fragment; at most URL_CHARACTERS_MAX
    the host        resolved once; every address it has must be public, and the connection goes to those
    the answer      its status alone; no redirect is followed, no byte of the body is read

With `is_loopback_allowed` (development) http and any port are taken too, for loopback addresses.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Mapping
from types import TracebackType
from typing import Final, Self
from urllib.parse import urlsplit

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult

from marketplace.notices.errors import NotDelivered, UnsafeUrl

URL_CHARACTERS_MAX: Final = 500
CALL_S_MAX: Final = 10
HTTPS_PORT: Final = 443


def require_safe_url(url: str, *, is_loopback_allowed: bool) -> None:
    """Raise UnsafeUrl for an address we would not call, as far as that can be told without resolving it."""
    if len(url) > URL_CHARACTERS_MAX or not url.isascii() or not url.isprintable() or " " in url:
        raise UnsafeUrl(f"a webhook address has at most {URL_CHARACTERS_MAX} printable ASCII characters")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as e:
        raise UnsafeUrl("this is not an address") from e
    if not host or parts.username is not None or parts.password is not None or parts.fragment:
        raise UnsafeUrl("a webhook address names a host, and no user, password or fragment")
    if is_loopback_allowed and parts.scheme in {"http", "https"} and host in {"127.0.0.1", "localhost"}:
        return
    if parts.scheme != "https" or port not in {None, HTTPS_PORT}:
        raise UnsafeUrl("a webhook address begins with https:// and uses port 443")
    if _is_numeric(host):
        raise UnsafeUrl("a webhook address names its host, not a number")


def is_public(address: str) -> bool:
    """Tell whether an IP address is one that anybody on the internet may reach.

    >>> [is_public(a) for a in ("8.8.8.8", "10.0.0.1", "169.254.169.254", "::ffff:8.8.8.8", "64:ff9b::1")]
    [True, False, False, False, False]
    """
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped or parsed.sixtofour or parsed.teredo or parsed in _NAT64:
            return False  # an IPv4 address in disguise
        if parsed.is_site_local:
            return False
    return parsed.is_global and not parsed.is_multicast


_NAT64: Final = ipaddress.ip_network("64:ff9b::/96")


def _is_numeric(host: str) -> bool:
    """Tell whether a C library might read this host as an IP address: 127.1, 0x7f000001, 2130706433, ::1."""
    last = host.rstrip(".").rpartition(".")[2]
    return ":" in host or last[:1].isdigit()


class _PublicResolver(AbstractResolver):
    """The system's resolver, refusing a host with any address that is not public."""

    def __init__(self, *, is_loopback_allowed: bool) -> None:
        self._system = aiohttp.ThreadedResolver()
        self._is_loopback_allowed = is_loopback_allowed

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        found = await self._system.resolve(host, port, family)
        refused = [answer["host"] for answer in found if not self._is_allowed(answer["host"])]
        if refused or not found:
            raise OSError(None, f"{host} has an address that is not public")
        return found

    def _is_allowed(self, address: str) -> bool:
        is_loopback = ipaddress.ip_address(address).is_loopback
        return (is_loopback and self._is_loopback_allowed) or is_public(address)

    async def close(self) -> None:
        await self._system.close()


class Caller:
    """Posts to webhooks; `async with` closes its connections."""

    def __init__(self, *, is_loopback_allowed: bool = False) -> None:
        self._is_loopback_allowed = is_loopback_allowed
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        connector = aiohttp.TCPConnector(
            resolver=_PublicResolver(is_loopback_allowed=self._is_loopback_allowed),
            use_dns_cache=False,
            force_close=True,  # each call resolves anew; nothing of one stranger's meets another's
        )
        timeout = aiohttp.ClientTimeout(total=CALL_S_MAX)
        self._session = aiohttp.ClientSession(
            connector=connector, timeout=timeout, cookie_jar=aiohttp.DummyCookieJar()
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()

    async def post(self, url: str, body: bytes, headers: Mapping[str, str]) -> None:
        """Send; NotDelivered unless the answer's status is 2xx."""
        assert self._session is not None, "used outside `async with`"
        try:
            require_safe_url(url, is_loopback_allowed=self._is_loopback_allowed)
            async with self._session.post(
                url, data=body, headers=dict(headers), allow_redirects=False
            ) as answer:
                status = answer.status
        except UnsafeUrl as e:
            raise NotDelivered(str(e)) from e
        except TimeoutError as e:
            raise NotDelivered(f"no answer within {CALL_S_MAX} s") from e
        except (aiohttp.ClientError, OSError, ValueError) as e:
            raise NotDelivered(f"{type(e).__name__}: {e}"[:300]) from e
        if not 200 <= status < 300:
            raise NotDelivered(f"answered {status}")
