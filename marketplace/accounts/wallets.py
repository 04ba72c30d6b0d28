"""Wallets as accounts: a person proves an address by signing a text we wrote.

The text is EIP-4361 ("Sign-In with Ethereum"), and its Solana sibling of the same form.  It names our
domain, so a wallet warns when another site asks for it; it carries a nonce that works once and ends after
five minutes; and what is checked is the very text we stored, so nothing in it can be altered.
A text that links a wallet says so and names the account: it cannot be used to sign in, nor the reverse.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final
from urllib.parse import urlsplit
from uuid import UUID

from sqlalchemy import delete, insert, select
from sqlalchemy.dialects import postgresql
from sqlalchemy.ext.asyncio import AsyncConnection

from chain.addresses import parse_payout_address
from chain.errors import ChainRefusal
from chain.evm.signatures import recover_personal_sign
from chain.networks import EVM_NETWORKS, Chain
from chain.solana.base58 import decode as base58_decode
from marketplace.accounts.errors import BadChallenge, WalletTaken
from marketplace.accounts.people import create_person
from marketplace.accounts.tables import wallet_challenges, wallets
from marketplace.accounts.tokens import make_nonce
from marketplace.platform.ids import uuid7
from marketplace.platform.settings import Settings

LIFETIME: Final = timedelta(minutes=5)
MESSAGE_MAX: Final = 2_000
SIGNATURE_MAX: Final = 200
SWEPT_AT_ONCE: Final = 100
_NONCE: Final = re.compile(r"^Nonce: ([0-9A-Za-z]{8,64})$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Challenge:
    """A text to sign."""

    nonce: str
    message: str
    expires_at: datetime


@dataclass(frozen=True, slots=True)
class ProvedWallet:
    """An address whose key signed our text just now."""

    kind: str
    address: str
    linking: UUID | None
    """The person the text links it to; None for a sign-in."""


def kind_of(chain: Chain) -> str:
    """Ethereum and Base share addresses, so a wallet of one is a wallet of the other."""
    return "evm" if chain.is_evm else "solana"


def origin(settings: Settings) -> tuple[str, str]:
    """The domain and URI a person sees in the text."""
    uri = settings.public_url or f"http://{settings.api_host}:{settings.api_port}"
    return urlsplit(uri).netloc, uri


def _instant(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def message_to_sign(
    settings: Settings, chain: Chain, address: str, *, nonce: str, now: datetime, linking: UUID | None
) -> str:
    """Write the text, in EIP-4361's form."""
    domain, uri = origin(settings)
    statement = (
        "Sign in to Tollway. This costs nothing and moves no money."
        if linking is None
        else f"Link this wallet to Tollway account {linking}. This costs nothing and moves no money."
    )
    network = EVM_NETWORKS.get(chain)
    return (
        f"{domain} wants you to sign in with your {'Solana' if network is None else 'Ethereum'} account:\n"
        f"{address}\n\n"
        f"{statement}\n\n"
        f"URI: {uri}\n"
        "Version: 1\n"
        f"Chain ID: {'mainnet' if network is None else network.chain_id}\n"
        f"Nonce: {nonce}\n"
        f"Issued At: {_instant(now)}\n"
        f"Expiration Time: {_instant(now + LIFETIME)}"
    )


async def challenge(
    connection: AsyncConnection,
    settings: Settings,
    chain: Chain,
    address_text: str,
    now: datetime,
    *,
    linking: UUID | None = None,
) -> Challenge:
    """Write and remember a text for this address; chain.errors.BadAddress if no key can own it."""
    address = parse_payout_address(chain, address_text)
    ended = (
        select(wallet_challenges.c.nonce)
        .where(wallet_challenges.c.expires_at <= now)
        .limit(SWEPT_AT_ONCE)
        .with_for_update(skip_locked=True)
    )
    await connection.execute(delete(wallet_challenges).where(wallet_challenges.c.nonce.in_(ended)))
    nonce = make_nonce()
    message = message_to_sign(settings, chain, address, nonce=nonce, now=now, linking=linking)
    made = Challenge(nonce, message, now + LIFETIME)
    await connection.execute(
        insert(wallet_challenges).values(
            nonce=nonce,
            kind=kind_of(chain),
            address=address,
            person_id=linking,
            message=made.message,
            expires_at=made.expires_at,
        )
    )
    return made


def nonce_in(message: str) -> str:
    """Read the nonce out of a signed text; BadChallenge if there is none."""
    found = _NONCE.search(message)
    if found is None:
        raise BadChallenge("this is not a text we asked anybody to sign")
    return found[1]


@dataclass(frozen=True, slots=True)
class TakenChallenge:
    """A challenge read and deleted: whatever follows, it will not work again."""

    kind: str
    address: str
    person_id: UUID | None
    message: str
    expires_at: datetime


async def take_challenge(connection: AsyncConnection, nonce: str) -> TakenChallenge:
    """Use a challenge up; commit before checking the answer, so that a wrong answer uses it up too."""
    use_up = (
        delete(wallet_challenges)
        .where(wallet_challenges.c.nonce == nonce)
        .returning(*(c for c in wallet_challenges.c if c.name != "nonce"))
    )
    row = (await connection.execute(use_up)).mappings().one_or_none()
    if row is None:
        raise BadChallenge("this challenge is unknown, used or expired; ask for a new one")
    return TakenChallenge(**row)


def check_answer(taken: TakenChallenge, message: str, signature: str, now: datetime) -> ProvedWallet:
    """Give the wallet that signed, or raise BadChallenge."""
    if now >= taken.expires_at:
        raise BadChallenge("this challenge is unknown, used or expired; ask for a new one")
    if message != taken.message:
        raise BadChallenge("the signed text differs from the one we gave")
    if not _signed(taken, signature):
        raise BadChallenge(f"the signature is not by {taken.address}")
    return ProvedWallet(taken.kind, taken.address, taken.person_id)


def _signed(taken: TakenChallenge, signature: str) -> bool:
    if taken.kind == "evm":
        try:
            return recover_personal_sign(taken.message, signature) == taken.address
        except ChainRefusal:
            return False
    try:
        raw = base58_decode(signature)
    except ValueError:
        return False
    from chain.solana.signatures import is_signed_by  # 9 MB, for gateways where somebody signs in so

    return is_signed_by(taken.address, taken.message.encode(), raw)


async def _claim(connection: AsyncConnection, proved: ProvedWallet, person_id: UUID, now: datetime) -> UUID:
    """Record the wallet as this person's, unless it is somebody's already; give whose it is."""
    await connection.execute(
        postgresql.insert(wallets)
        .values(id=uuid7(), person_id=person_id, kind=proved.kind, address=proved.address, verified_at=now)
        .on_conflict_do_nothing(index_elements=["kind", "address"])
    )
    return await owner_of(connection, proved) or person_id


async def owner_of(connection: AsyncConnection, proved: ProvedWallet) -> UUID | None:
    """Whom this wallet signs in; None if nobody."""
    query = select(wallets.c.person_id).where(
        wallets.c.kind == proved.kind, wallets.c.address == proved.address
    )
    found: UUID | None = await connection.scalar(query)
    return found


async def sign_in(connection: AsyncConnection, proved: ProvedWallet, now: datetime) -> UUID:
    """Give the wallet's person, made at the first sign-in."""
    owner = await owner_of(connection, proved)
    if owner is not None:
        return owner
    savepoint = await connection.begin_nested()
    made = await create_person(connection)
    owner = await _claim(connection, proved, made, now)
    if owner != made:  # the same wallet signed in at the same moment elsewhere
        await savepoint.rollback()
    else:
        await savepoint.commit()
    return owner


async def link(connection: AsyncConnection, proved: ProvedWallet, person_id: UUID, now: datetime) -> None:
    """Let the wallet sign this person in too; WalletTaken if it signs in another."""
    if await _claim(connection, proved, person_id, now) != person_id:
        raise WalletTaken("this wallet signs in another account")
