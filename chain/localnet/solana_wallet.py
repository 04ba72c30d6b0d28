"""A buyer's or operator's wallet on the development chain: what Phantom does, without the screen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final
from urllib.parse import parse_qs, urlsplit

from solders.instruction import AccountMeta, Instruction
from solders.keypair import Keypair
from solders.pubkey import Pubkey

from chain.networks import SOLANA
from chain.solana import programs
from chain.solana.rpc import SolanaRpc
from chain.solana.sending import send_and_confirm
from chain.units import Micro, parse_usdc

REFERENCES_MAX: Final = 16


class SolanaWallet:
    """One key and its USDC account."""

    def __init__(self, rpc: SolanaRpc, *, seed: bytes | None = None) -> None:
        self._rpc = rpc
        self._key = Keypair() if seed is None else Keypair.from_seed(seed)
        self._mint = Pubkey.from_string(SOLANA.usdc_mint)

    @property
    def address(self) -> str:
        """The wallet's address (base58)."""
        return str(self._key.pubkey())

    @property
    def token_account(self) -> str:
        """Where its USDC lies."""
        return str(programs.associated_token_account(self._key.pubkey(), self._mint))

    def sign_message(self, message: bytes) -> bytes:
        """Sign text, as for a sign-in; 64 bytes."""
        return bytes(self._key.sign_message(message))

    async def usdc(self, commitment: str = "confirmed") -> Micro:
        """USDC held."""
        state = await self._rpc.account(self.token_account, commitment)
        return Micro(programs.token_account(state.owner, state.bytes()).amount if state else 0)

    async def pay(self, to: str, amount: Micro, *, references: Sequence[str] = ()) -> str:
        """Send USDC to the wallet `to`, making its token account if need be; gives the signature, confirmed.

        This is also what an exchange's withdrawal to a pool address looks like.
        """
        owner = Pubkey.from_string(to)
        make = programs.create_associated_token_account(self._key.pubkey(), owner, self._mint)
        move = programs.transfer_checked(
            source=Pubkey.from_string(self.token_account),
            mint=self._mint,
            to=programs.associated_token_account(owner, self._mint),
            authority=self._key.pubkey(),
            signers=(),
            amount=amount.n,
        )
        keys = [AccountMeta(Pubkey.from_string(r), is_signer=False, is_writable=False) for r in references]
        move = Instruction(move.program_id, bytes(move.data), [*move.accounts, *keys])
        return await send_and_confirm(self._rpc, [make, move], [self._key])

    async def pay_link(self, url: str, amount: Micro | None = None) -> str:
        """Follow a Solana Pay link; `amount` where the link leaves it open.  ValueError for another token."""
        parts = urlsplit(url)
        fields = parse_qs(parts.query, max_num_fields=REFERENCES_MAX)
        if parts.scheme != "solana" or fields.get("spl-token") != [SOLANA.usdc_mint]:
            raise ValueError(f"{url[:80]!r} is not a Solana Pay link for USDC")
        due = parse_usdc(fields["amount"][0]) if "amount" in fields else amount
        if due is None:
            raise ValueError("the link names no amount")
        return await self.pay(parts.path, due, references=fields.get("reference", ()))
