"""Addresses buyers pay to on Solana, for senders that only know an address (exchanges).

A pool address per account: a wallet whose key is derived from a secret seed.  Making the address creates
its token account and lets the escrow multisig move everything out of it; from then on its key is never
needed again.  (Wallets pay without any of this: `pay`.)

The seed stays with the settler, offline where possible: whoever has it can take what lies unswept on
the pool's addresses, never the escrow.  Key `index` is SLIP-0010 (Ed25519, all hardened) at
m/44'/501'/index'/0', the path wallets use, so that any wallet can recover a pool key.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass
from typing import Final

from solders.keypair import Keypair
from solders.pubkey import Pubkey

from chain.networks import SOLANA
from chain.solana import programs
from chain.solana.rpc import SolanaRpc
from chain.solana.sending import send_and_confirm

HARDENED: Final = 2**31
SEED_BYTES: Final = (32, 64)
"""Shortest and longest seed; 32 fresh random bytes are right."""


@dataclass(frozen=True, slots=True)
class PoolAddress:
    """A buyer's deposit address; addresses in base58."""

    index: int
    owner: str
    """What the buyer is shown: a wallet address, from which every sender derives `token_account`."""
    token_account: str
    """What is watched."""


def derive_owner(seed: bytes, index: int) -> Keypair:
    """Derive the pool's key `index` (0 … 2^31 − 1) from the settler's secret seed."""
    if not SEED_BYTES[0] <= len(seed) <= SEED_BYTES[1]:
        raise ValueError(f"a pool seed has {SEED_BYTES[0]}..{SEED_BYTES[1]} bytes, not {len(seed)}")
    if not 0 <= index < HARDENED:
        raise ValueError(f"pool index {index} is outside 0..2^31-1")
    node = hmac.digest(b"ed25519 seed", seed, hashlib.sha512)
    for step in (44, 501, index, 0):
        data = b"\0" + node[:32] + (step + HARDENED).to_bytes(4)
        node = hmac.digest(node[32:], data, hashlib.sha512)
    return Keypair.from_seed(node[:32])


def pool_address(seed: bytes, index: int, *, mint: str = SOLANA.usdc_mint) -> PoolAddress:
    """Compute pool address `index` without touching the chain."""
    owner = derive_owner(seed, index).pubkey()
    account = programs.associated_token_account(owner, Pubkey.from_string(mint))
    return PoolAddress(index, str(owner), str(account))


async def prepare_pool_address(
    rpc: SolanaRpc, gas_key: Keypair, seed: bytes, index: int, *, multisig: str, mint: str = SOLANA.usdc_mint
) -> PoolAddress:
    """Make pool address `index` payable and sweepable; does nothing if it already is.

    One transaction, paid by the gas key (rent 2,039,280 lamports, 10,000 fee): create the token account,
    approve the multisig for 2^64 − 1.  Raises Reverted, UnknownResult (call again), RpcUnavailable.
    """
    address = pool_address(seed, index, mint=mint)
    owner = derive_owner(seed, index)
    state = await rpc.account(address.token_account, "confirmed")
    if state is not None:
        account = programs.token_account(state.owner, state.bytes())
        if account.delegate == multisig and account.delegated_amount > programs.U64_MAX // 2:
            return address
    make = programs.create_associated_token_account(
        gas_key.pubkey(), owner.pubkey(), Pubkey.from_string(mint)
    )
    allow = programs.approve(
        source=Pubkey.from_string(address.token_account),
        delegate=Pubkey.from_string(multisig),
        owner=owner.pubkey(),
        amount=programs.U64_MAX,
    )
    await send_and_confirm(rpc, [make, allow], [gas_key, owner])
    return address
