"""The agent's connection to the fabric: where, as whom, and over which TLS.

`nats_url` may name several servers, separated by commas; any of them will do. `tls://` checks the server's
certificate against the system's authorities, or against the file `nats_ca` names.
"""

import asyncio
import contextlib
import ssl
from pathlib import Path
from typing import Any, Final

import nats.errors
from nats.aio.client import Client

from node_agent.config import Config, ConfigError
from node_agent.identity import Identity

CONNECT_SECONDS_MAX: Final = 5
CLOSE_SECONDS_MAX: Final = 1


class FabricRefusedError(Exception):
    """The fabric cannot be reached, or does not let this node in."""


def connect_options(config: Config, identity: Identity) -> dict[str, Any]:
    """Give the options of nats-py's `connect`; raises `ConfigError` if `nats_ca` cannot be used."""
    options: dict[str, Any] = {
        "servers": servers_of(config.nats_url),
        "name": f"tollway-node {config.node_id}",
        "nkeys_seed_str": identity.seed,
        "connect_timeout": CONNECT_SECONDS_MAX,
    }
    if config.nats_ca:
        try:
            options["tls"] = ssl.create_default_context(cafile=str(Path(config.nats_ca).expanduser()))
        except OSError as error:
            raise ConfigError(f"nats_ca {config.nats_ca!r} cannot be used ({error})") from error
    return options


def servers_of(nats_url: str) -> list[str]:
    """The servers a comma-separated list names."""
    return [part.strip() for part in nats_url.split(",") if part.strip()]


async def try_connection(config: Config, identity: Identity) -> None:
    """Connect as this node and leave again; raises `FabricRefusedError`.

    The marketplace keeps one connection per node, so this would cut a running agent's: ask it instead.
    """
    client = Client()
    errors: list[Exception] = []

    async def on_error(error: Exception) -> None:
        errors.append(error)

    try:
        await client.connect(
            **connect_options(config, identity),
            allow_reconnect=False,
            max_reconnect_attempts=1,  # per server; 0 would be without end
            reconnect_time_wait=0,
            error_cb=on_error,
        )
        await client.flush(CONNECT_SECONDS_MAX)
    except (nats.errors.Error, OSError, TimeoutError) as error:
        told = " ".join(str(errors[-1] if errors else error).split()) or type(error).__name__
        raise FabricRefusedError(told) from error
    finally:
        # Where TLS failed, nats-py's `close` waits for ever, and with it the error that says why.
        with contextlib.suppress(nats.errors.Error, OSError, TimeoutError):
            async with asyncio.timeout(CLOSE_SECONDS_MAX):
                await client.close()
