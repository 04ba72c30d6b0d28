"""Emptying pool addresses into the escrow, many in one transaction, by the multisig as delegate.

`due` tells what lies on them; `MultisigRail.prepare_sweep` freezes a batch (signed, assembled, sent and
proven exactly as a payout batch, on its own nonce account); `MultisigRail.swept` describes what landed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from chain.errors import Malformed
from chain.solana import programs
from chain.solana.escrow import EscrowTerms
from chain.solana.rpc import SolanaRpc
from chain.units import Micro

ACCOUNTS_PER_REQUEST: Final = 100


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


def sweep_terms(terms: EscrowTerms, sweep_nonce_account: str) -> EscrowTerms:
    """The escrow's terms on the sweeps' own nonce, so that a waiting sweep never blocks a payout."""
    return replace(terms, nonce_account=sweep_nonce_account)
