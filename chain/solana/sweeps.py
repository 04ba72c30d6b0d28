"""Emptying pool addresses into the escrow, many in one transaction, by the multisig as delegate.

`due` tells what lies on them; `MultisigRail.prepare_sweep` freezes a batch (signed, assembled, sent and
proven exactly as a payout batch, on its own nonce account); `MultisigRail.swept` describes what landed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from solders.hash import Hash
from solders.keypair import Keypair
from solders.pubkey import Pubkey
from solders.system_program import ID as SYSTEM_PROGRAM
from solders.system_program import (
    CreateAccountWithSeedParams,
    InitializeNonceAccountParams,
    create_account_with_seed,
    initialize_nonce_account,
)

from chain.errors import Malformed, UnknownResult
from chain.ports import PayoutLine
from chain.solana import escrow, programs
from chain.solana.escrow import EscrowTerms
from chain.solana.rpc import SolanaRpc
from chain.solana.sending import send_and_confirm
from chain.units import Micro

ACCOUNTS_PER_REQUEST: Final = 100
FINAL_S_MAX: Final = 60.0
POLL_S: Final = 0.1
NONCE_SEED: Final = "tollway-sweeps"
SWEEP_LINES_MAX: Final = 15
"""Where `fitting` starts: no transaction holds more without lookup tables."""


NO_DELEGATE: Final = "the multisig is not its delegate"


async def obstacles(
    rpc: SolanaRpc, terms: EscrowTerms, token_accounts: Sequence[str]
) -> list[tuple[str, str]]:
    """List (token account, why) of the pool accounts that hold money and cannot be swept."""
    found: list[tuple[str, str]] = []
    for i in range(0, len(token_accounts), ACCOUNTS_PER_REQUEST):
        page = token_accounts[i : i + ACCOUNTS_PER_REQUEST]
        for key, state in zip(page, await rpc.accounts(page, "finalized"), strict=True):
            account = None if state is None else programs.token_account(state.owner, state.bytes())
            if account is None or not account.amount:
                continue
            if account.is_frozen:
                found.append((key, "frozen by the issuer"))
            elif account.delegate != terms.multisig or account.delegated_amount < account.amount:
                found.append((key, NO_DELEGATE))
    return found


async def due(
    rpc: SolanaRpc, terms: EscrowTerms, token_accounts: Sequence[str], *, minimum: Micro
) -> list[tuple[str, Micro]]:
    """List (token account, finalized amount) of the pool accounts worth sweeping, largest first.

    Left out: accounts that do not exist, hold less than `minimum`, are frozen, or whose owner took the
    multisig's approval back.  Malformed if one is not a USDC account.
    """
    found: list[tuple[str, Micro]] = []
    for i in range(0, len(token_accounts), ACCOUNTS_PER_REQUEST):
        page = token_accounts[i : i + ACCOUNTS_PER_REQUEST]
        for key, state in zip(page, await rpc.accounts(page, "finalized"), strict=True):
            if state is None:
                continue
            account = programs.token_account(state.owner, state.bytes())
            if account.mint != terms.mint:
                raise Malformed(f"{key} is not a USDC account")
            is_ours = account.delegate == terms.multisig and account.delegated_amount >= account.amount
            if is_ours and not account.is_frozen and account.amount >= max(minimum.n, 1):
                found.append((key, Micro(account.amount)))
    return sorted(found, key=lambda move: (-move[1].n, move[0]))


def lines_of(moves: Sequence[tuple[str, Micro]]) -> list[PayoutLine]:
    """The lines of a sweep, as `MultisigRail.prepare_sweep` and a signer's own machine both write them."""
    return [PayoutLine(f"sweep:{account}", account, amount) for account, amount in moves]


def fitting(terms: EscrowTerms, moves: Sequence[tuple[str, Micro]]) -> list[tuple[str, Micro]]:
    """The longest beginning of `moves` that one transaction holds."""
    fence = str(Hash.default())
    for count in range(min(len(moves), SWEEP_LINES_MAX), 0, -1):
        try:
            escrow.build(terms, escrow.SWEEP, lines_of(moves[:count]), fence)
        except escrow.TooManyLines:
            continue
        return list(moves[:count])
    return []


def sweep_nonce_address(gas_payer: str) -> str:
    """Where the sweeps' durable nonce is: it follows from the gas payer, so that a signer pins it offline."""
    key = Pubkey.create_with_seed(Pubkey.from_string(gas_payer), NONCE_SEED, SYSTEM_PROGRAM)
    return str(key)


async def ensure_sweep_nonce(rpc: SolanaRpc, gas_key: Keypair) -> str:
    """Make the sweeps' nonce account if it does not exist (rent about 1,450,000 lamports); its address."""
    address = sweep_nonce_address(str(gas_key.pubkey()))
    if await rpc.account(address, "confirmed") is not None:
        await _until_final(rpc, address)
        return address
    rent = await rpc.call("getMinimumBalanceForRentExemption", [programs.NONCE_BYTES], int)
    nonce, gas = Pubkey.from_string(address), gas_key.pubkey()
    make = create_account_with_seed(
        CreateAccountWithSeedParams(
            from_pubkey=gas,
            to_pubkey=nonce,
            base=gas,
            seed=NONCE_SEED,
            lamports=rent,
            space=programs.NONCE_BYTES,
            owner=SYSTEM_PROGRAM,
        )
    )
    begin = initialize_nonce_account(InitializeNonceAccountParams(nonce_pubkey=nonce, authority=gas))
    await send_and_confirm(rpc, [make, begin], [gas_key])
    await _until_final(rpc, address)
    return address


async def _until_final(rpc: SolanaRpc, address: str) -> None:
    """A fence is read at finality; UnknownResult after FINAL_S_MAX seconds."""
    for _ in range(int(FINAL_S_MAX / POLL_S)):
        if await rpc.account(address, "finalized") is not None:
            return
        await asyncio.sleep(POLL_S)
    raise UnknownResult(f"{address} is not final after {FINAL_S_MAX} s")


def sweep_terms(terms: EscrowTerms, sweep_nonce_account: str) -> EscrowTerms:
    """The escrow's terms on the sweeps' own nonce, so that a waiting sweep never blocks a payout."""
    return replace(terms, nonce_account=sweep_nonce_account)
