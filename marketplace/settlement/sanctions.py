"""Addresses that nobody may pay: screened when one is added to an address book, and again at planning.

The list comes from a file that somebody fetched and checked: one address a line, `#` starts a comment.  A
refresh replaces the whole list, or nothing.  EVM addresses are compared without case.  Published lists name
other chains' addresses too: those are counted and left out, since they cannot be paid from here.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from datetime import datetime
from pathlib import Path
from typing import Final, NamedTuple

from sqlalchemy import delete, insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from marketplace.settlement.errors import SettlementRefusal
from marketplace.settlement.tables import sanctioned_addresses

BYTES_MAX: Final = 16 * 1024 * 1024
_ADDRESS: Final = re.compile(r"0[xX][0-9a-fA-F]{40}|(?!0[xX])[0-9a-zA-Z]{32,44}")
"""As long as deposits' list of senders takes."""
_OF_ANOTHER_CHAIN: Final = re.compile(
    r"(bc1|ltc1|addr1|cosmos1|zs1|bitcoincash:)[0-9a-z]{20,120}"
    r"|[13][1-9A-HJ-NP-Za-km-z]{24,30}|[48][1-9A-HJ-NP-Za-km-z]{94}"
)
"""Bech32 and the like, old Bitcoin, Monero, by how they begin and how long they are: an address of ours that
was cut short, or two without a line's end between them, must be told and not left out."""
ROWS_PER_STATEMENT: Final = 5_000


class BadList(SettlementRefusal):
    """The file is not a list of addresses; the list in force stays."""

    code = "bad_sanctions_list"


class Sanctioned(SettlementRefusal):
    """The address is on a sanctions list."""

    code = "address_sanctioned"


class AddressList(NamedTuple):
    """What a file names."""

    addresses: frozenset[str]
    of_other_chains: int


def read_list(path: Path) -> AddressList:
    """Read a list; BadList if it is empty, too large, or not one address a line; it names the line."""
    try:
        with path.open("rb") as file:
            raw = file.read(BYTES_MAX + 1)
        text = raw.decode("ascii")
    except (OSError, UnicodeDecodeError) as e:
        raise BadList(f"{path} cannot be read as a list of addresses: {e}") from e
    lines = [line.partition("#")[0].strip() for line in text.splitlines()]
    found = frozenset(canonical(line) for line in lines if _ADDRESS.fullmatch(line))
    others = 0
    for number, line in enumerate(lines, 1):
        if not line or _ADDRESS.fullmatch(line):
            continue
        if not _OF_ANOTHER_CHAIN.fullmatch(line):
            raise BadList(f"{path}, line {number}: {line[:60]!r} is not an address")
        others += 1
    if len(raw) > BYTES_MAX or not found:
        raise BadList(f"{path} names no address that could be paid here, or is over {BYTES_MAX} bytes")
    return AddressList(found, others)


async def refresh(conn: AsyncConnection, addresses: frozenset[str], *, source: str, now: datetime) -> None:
    """Put this list in force instead of the one before."""
    await conn.execute(delete(sanctioned_addresses))
    rows = [{"address": a, "source": source[:200], "listed_at": now} for a in sorted(addresses)]
    for start in range(0, len(rows), ROWS_PER_STATEMENT):
        await conn.execute(insert(sanctioned_addresses), rows[start : start + ROWS_PER_STATEMENT])


async def listed(conn: AsyncConnection, addresses: Collection[str]) -> frozenset[str]:
    """Those of `addresses` that are on the list, as they were given."""
    by_key = {canonical(address): address for address in addresses}
    t = sanctioned_addresses.c
    found = await conn.scalars(select(t.address).where(t.address.in_(list(by_key))))
    return frozenset(by_key[address] for address in found)


def canonical(address: str) -> str:
    """As addresses are compared: those of EVM chains without case, others as they are."""
    return address.lower() if address[:2].lower() == "0x" else address
