"""Addresses, account layouts and instructions of the programs we use.

Layouts: SPL Token `state.rs` (Account 165 bytes, Mint 82, Multisig 355), the system program's nonce
account (80 bytes: version, state, authority, nonce, fee).  Pure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from solders.instruction import AccountMeta, Instruction
from solders.pubkey import Pubkey
from solders.system_program import ID as SYSTEM_PROGRAM
from solders.system_program import AdvanceNonceAccountParams, advance_nonce_account

from chain.errors import Malformed

TOKEN_PROGRAM: Final = Pubkey.from_string("TokenkegQfeZyiNwAJbNbGKPFXCWuBvf9Ss623VQ5DA")
ASSOCIATED_TOKEN_PROGRAM: Final = Pubkey.from_string("ATokenGPvbdGVxr1b2hvZbsiqW5xWH25efTNsLJA8knL")

USDC_DECIMALS: Final = 6
TOKEN_ACCOUNT_BYTES: Final = 165
MULTISIG_BYTES: Final = 355
MULTISIG_SIGNERS_MAX: Final = 11
NONCE_BYTES: Final = 80
U64_MAX: Final = 2**64 - 1

_INITIALIZE_MULTISIG_2: Final = 19
_APPROVE: Final = 4
_MINT_TO: Final = 7
_TRANSFER_CHECKED: Final = 12
_CREATE_IDEMPOTENT: Final = b"\1"


@dataclass(frozen=True, slots=True)
class TokenAccount:
    """An SPL token account."""

    mint: str
    owner: str
    amount: int
    delegate: str | None
    is_frozen: bool
    delegated_amount: int


def token_account(owner_program: str, data: bytes) -> TokenAccount:
    """Parse a token account of the pinned Token program; Malformed for anything else."""
    if owner_program != str(TOKEN_PROGRAM):
        raise Malformed(f"account belongs to {owner_program}, not to the Token program")
    if len(data) != TOKEN_ACCOUNT_BYTES or data[108] not in (1, 2):
        raise Malformed("not an initialised token account")
    has_delegate = int.from_bytes(data[72:76], "little") == 1
    return TokenAccount(
        mint=str(Pubkey(data[:32])),
        owner=str(Pubkey(data[32:64])),
        amount=int.from_bytes(data[64:72], "little"),
        delegate=str(Pubkey(data[76:108])) if has_delegate else None,
        is_frozen=data[108] == 2,
        delegated_amount=int.from_bytes(data[121:129], "little"),
    )


def multisig_account(owner_program: str, data: bytes) -> tuple[int, tuple[str, ...]]:
    """Parse (threshold, signers) of an SPL multisig; Malformed for anything else."""
    if owner_program != str(TOKEN_PROGRAM) or len(data) != MULTISIG_BYTES or data[2] != 1:
        raise Malformed("not an initialised SPL multisig")
    threshold, count = data[0], data[1]
    return threshold, tuple(str(Pubkey(data[3 + 32 * i : 35 + 32 * i])) for i in range(count))


def nonce_account(owner_program: str, data: bytes) -> tuple[str, str]:
    """Parse (authority, nonce value) of an initialised durable nonce account; Malformed otherwise."""
    if owner_program != str(SYSTEM_PROGRAM) or len(data) != NONCE_BYTES or data[4:8] != b"\1\0\0\0":
        raise Malformed("not an initialised nonce account")
    return str(Pubkey(data[8:40])), str(Pubkey(data[40:72]))


def associated_token_account(owner: Pubkey, mint: Pubkey) -> Pubkey:
    """The token account every wallet derives for `owner`; `owner` may be off the curve."""
    seeds = [bytes(owner), bytes(TOKEN_PROGRAM), bytes(mint)]
    return Pubkey.find_program_address(seeds, ASSOCIATED_TOKEN_PROGRAM)[0]


def create_associated_token_account(payer: Pubkey, owner: Pubkey, mint: Pubkey) -> Instruction:
    """Create it unless it exists (CreateIdempotent)."""
    metas = [
        AccountMeta(payer, is_signer=True, is_writable=True),
        AccountMeta(associated_token_account(owner, mint), is_signer=False, is_writable=True),
        AccountMeta(owner, is_signer=False, is_writable=False),
        AccountMeta(mint, is_signer=False, is_writable=False),
        AccountMeta(SYSTEM_PROGRAM, is_signer=False, is_writable=False),
        AccountMeta(TOKEN_PROGRAM, is_signer=False, is_writable=False),
    ]
    return Instruction(ASSOCIATED_TOKEN_PROGRAM, _CREATE_IDEMPOTENT, metas)


def transfer_checked(
    *, source: Pubkey, mint: Pubkey, to: Pubkey, authority: Pubkey, signers: tuple[Pubkey, ...], amount: int
) -> Instruction:
    """Move `amount` micro-USDC; with `signers`, `authority` is a multisig and they consent for it."""
    metas = [
        AccountMeta(source, is_signer=False, is_writable=True),
        AccountMeta(mint, is_signer=False, is_writable=False),
        AccountMeta(to, is_signer=False, is_writable=True),
        AccountMeta(authority, is_signer=not signers, is_writable=False),
        *(AccountMeta(s, is_signer=True, is_writable=False) for s in signers),
    ]
    data = bytes([_TRANSFER_CHECKED]) + amount.to_bytes(8, "little") + bytes([USDC_DECIMALS])
    return Instruction(TOKEN_PROGRAM, data, metas)


def approve(*, source: Pubkey, delegate: Pubkey, owner: Pubkey, amount: int) -> Instruction:
    """Let `delegate` move up to `amount` out of `source`."""
    metas = [
        AccountMeta(source, is_signer=False, is_writable=True),
        AccountMeta(delegate, is_signer=False, is_writable=False),
        AccountMeta(owner, is_signer=True, is_writable=False),
    ]
    return Instruction(TOKEN_PROGRAM, bytes([_APPROVE]) + amount.to_bytes(8, "little"), metas)


def mint_to(*, mint: Pubkey, to: Pubkey, authority: Pubkey, amount: int) -> Instruction:
    """Create tokens; on development chains only, where we hold the mint authority."""
    metas = [
        AccountMeta(mint, is_signer=False, is_writable=True),
        AccountMeta(to, is_signer=False, is_writable=True),
        AccountMeta(authority, is_signer=True, is_writable=False),
    ]
    return Instruction(TOKEN_PROGRAM, bytes([_MINT_TO]) + amount.to_bytes(8, "little"), metas)


def initialize_multisig(multisig: Pubkey, signers: tuple[Pubkey, ...], threshold: int) -> Instruction:
    """Make an allocated account a `threshold`-of-`len(signers)` multisig (InitializeMultisig2)."""
    metas = [
        AccountMeta(multisig, is_signer=False, is_writable=True),
        *(AccountMeta(s, is_signer=False, is_writable=False) for s in signers),
    ]
    return Instruction(TOKEN_PROGRAM, bytes([_INITIALIZE_MULTISIG_2, threshold]), metas)


def advance_nonce(nonce: Pubkey, authority: Pubkey) -> Instruction:
    """Spend the fence; must be a transaction's first instruction."""
    return advance_nonce_account(AdvanceNonceAccountParams(nonce_pubkey=nonce, authorized_pubkey=authority))
