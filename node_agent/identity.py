"""Who this node is: an Ed25519 nkey whose private half never leaves the operator's disk.

The key signs two things: the enrolment, once, and the NATS server's challenge at each connection.
"""

import os
import stat
from pathlib import Path
from typing import Final

import nkeys

from node_agent import protocol
from node_agent.files import write_private

KEY_FILE: Final = "key.seed"


class IdentityError(Exception):
    """The key file is missing, unreadable, or open to others."""


class Identity:
    """A node's key pair."""

    def __init__(self, seed: str) -> None:
        try:
            self._pair = nkeys.from_seed(bytearray(seed.encode()))
            self.public_key: str = self._pair.public_key.decode().rstrip("=")
            protocol.parse_public_key(self.public_key)
        except (nkeys.NkeysError, protocol.ProofInvalidError, ValueError) as error:
            raise IdentityError("the key file holds no node key") from error
        self._seed = seed

    @property
    def seed(self) -> str:
        """The private key, for the NATS client only."""
        return self._seed

    def enroll_request(
        self, *, token: str, name: str, time_ms: int, agent_version: str
    ) -> protocol.EnrollRequest:
        """Give back an enrolment that proves possession of the key."""
        signed = protocol.enroll_signing_bytes(token, self.public_key, time_ms)
        return protocol.EnrollRequest(
            token=token,
            public_key=self.public_key,
            time_ms=time_ms,
            signature=protocol.to_base64url(self._pair.sign(signed)),
            agent_version=agent_version,
            name=name,
        )


def create_identity(folder: Path) -> Identity:
    """Give back the identity kept in `folder`, made now if there is none."""
    path = folder / KEY_FILE
    if path.exists():
        return load_identity(folder)
    seed = nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER).decode()
    identity = Identity(seed)
    write_private(path, seed.encode() + b"\n")
    return identity


def load_identity(folder: Path) -> Identity:
    """Give back the identity kept in `folder`; raises `IdentityError`, also if others may read the key."""
    path = folder / KEY_FILE
    try:
        mode = path.stat().st_mode
        seed = path.read_text().strip()
    except FileNotFoundError as error:
        raise IdentityError(
            f"There is no key in {folder}. Enrol this machine first: tollway-node enroll TOKEN --api URL"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise IdentityError(f"{path} cannot be read") from error
    if os.name == "posix" and stat.S_IMODE(mode) & 0o077:
        raise IdentityError(f"{path} is open to other users. Close it: chmod 600 {path}")
    return Identity(seed)
