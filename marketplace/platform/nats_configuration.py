"""What nats-server is told: the same text for the embedded server, for one behind TLS and for a cluster.

    accounts   AUTH (user `auth`: answers the server's auth callout), APP (user `marketplace`, and every
               node the callout admits), SYS (user `system`: cuts connections)
    nodes      come without a password; the callout decides (`marketplace.fabric.callout`)

Every server of a cluster gets the same credentials and the same cluster password; only name, addresses,
certificate and routes differ.  `tollway nats-config` prints the text for one server.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import nkeys

PAYLOAD_BYTES_MAX: Final = 2 * 1024 * 1024
"""Above the largest request (1 MiB body) and frame (256 KiB) with room for their envelopes."""
NO_ACCOUNT_SEED: Final = "TOLLWAY_NATS_ISSUER_SEED is no account seed: `nk -gen account` makes one"
_UNQUOTABLE: Final = frozenset('"\\\r\n')


@dataclass(frozen=True, slots=True)
class NatsCredentials:
    """What the marketplace's processes need to speak to the server; secrets."""

    password: str
    """Of the users `auth`, `marketplace` and `system`."""
    issuer_seed: str
    """Account nkey seed that signs the callout's answers."""

    @property
    def issuer(self) -> str:
        """The account's public key, which the server is told to trust; ValueError for another seed."""
        try:
            key = str(nkeys.from_seed(self.issuer_seed.encode()).public_key.decode())
        except nkeys.NkeysError as e:
            raise ValueError(NO_ACCOUNT_SEED) from e
        if not key.startswith("A"):
            raise ValueError(NO_ACCOUNT_SEED)
        return key


@dataclass(frozen=True, slots=True)
class Tls:
    """A server's certificate (PEM files); `ca` is who signed the other servers' of its cluster."""

    certificate: Path
    key: Path
    ca: Path | None = None


@dataclass(frozen=True, slots=True)
class Cluster:
    """Servers that are one fabric. Routes are other servers' `host:port` of `listen`; one is enough."""

    name: str
    listen: str
    routes: tuple[str, ...]
    password: str
    """The servers' own, for each other."""


@dataclass(frozen=True, slots=True)
class Server:
    """One nats-server. `listen`: host:port where gateways and nodes dial."""

    name: str
    listen: str
    store: Path
    """JetStream's folder."""
    tls: Tls | None = None
    cluster: Cluster | None = None


def configuration(server: Server, credentials: NatsCredentials) -> str:
    """Give the configuration file's text; it holds secrets. ValueError for what cannot be quoted."""
    password = _quoted(credentials.password)
    return f"""\
server_name: {_quoted(server.name)}
listen: {_quoted(server.listen)}
max_payload: {PAYLOAD_BYTES_MAX}
max_pending: 64MB
write_deadline: "10s"
{_tls(server.tls)}\
jetstream {{ store_dir: {_quoted(str(server.store))}, max_memory_store: 64MB, max_file_store: 4GB }}
accounts {{
  # nats-server sends nonces, which nodes sign, only where some nkey user exists; nobody has this one's seed.
  AUTH {{ users: [ {{ user: "auth", password: {password} }}, {{ nkey: "{_nobodys_key()}" }} ] }}
  APP {{ jetstream: enabled, users: [ {{ user: "marketplace", password: {password} }} ] }}
  SYS {{ users: [ {{ user: "system", password: {password} }} ] }}
}}
system_account: SYS
authorization {{
  timeout: 5
  auth_callout {{ issuer: "{credentials.issuer}", account: AUTH, auth_users: [ auth, marketplace, system ] }}
}}
{_cluster(server.cluster, server.tls)}"""


def _tls(tls: Tls | None) -> str:
    if tls is None:
        return ""
    return f"tls {{ {_files(tls)}, timeout: 5 }}\n"


def _cluster(cluster: Cluster | None, tls: Tls | None) -> str:
    if cluster is None:
        return ""
    password = _quoted(cluster.password)
    routes = ", ".join(_quoted(f"nats://cluster:{cluster.password}@{route}") for route in cluster.routes)
    # Servers show one another their certificates; without a CA of theirs to check by, only passwords.
    secured = ""
    if tls is not None and tls.ca is not None:
        secured = f"\n  tls {{ {_files(tls)}, ca_file: {_quoted(str(tls.ca))}, verify: true, timeout: 5 }}"
    return f"""\
cluster {{
  name: {_quoted(cluster.name)}
  listen: {_quoted(cluster.listen)}
  authorization {{ user: "cluster", password: {password}, timeout: 5 }}
  routes: [ {routes} ]{secured}
}}
"""


def _files(tls: Tls) -> str:
    return f"cert_file: {_quoted(str(tls.certificate))}, key_file: {_quoted(str(tls.key))}"


def _quoted(text: str) -> str:
    if not _UNQUOTABLE.isdisjoint(text):
        raise ValueError("a value of the NATS configuration holds a quote, backslash or line break")
    return f'"{text}"'


def _nobodys_key() -> str:
    """A user nkey whose seed is thrown away."""
    seed = nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER)
    return str(nkeys.from_seed(seed).public_key.decode())
