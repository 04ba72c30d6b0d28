"""What a signer consents to, rebuilt from his own settings, without a node.

The half of a `PayoutRail` that needs no network and no key of the settler's: a signer's own machine and the
API both check with it.  Everything a message depends on besides lines and fence (chain, escrow, token,
multisig, nonce account) comes from our own settings; an export that names anything else is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from chain.errors import ChainRefusal
from chain.networks import EVM_NETWORKS, Chain
from chain.ports import Approval, PayoutLine, Unsigned
from marketplace.platform.settings import ChainsConfig, EvmChainConfig, SolanaChainConfig


class Consent(Protocol):
    """Rebuilding and checking what the multisig of one chain signs; pure."""

    @property
    def chain(self) -> Chain: ...

    @property
    def escrow(self) -> str: ...

    @property
    def signers(self) -> tuple[str, ...]: ...

    @property
    def threshold(self) -> int: ...

    def rebuild(self, lines: Sequence[PayoutLine], fence: str, context: dict[str, str]) -> Unsigned:
        """Rebuild what must be signed; ChainRefusal if the context is not ours."""
        ...

    def verify(self, unsigned: Unsigned, approval: Approval) -> None:
        """Raise ChainRefusal unless every signature is the named signer's, over these messages."""
        ...


def consent_of(chains: ChainsConfig, chain: Chain) -> Consent:
    """Give the rules of one chain's multisig as our settings have them."""
    if chain is Chain.SOLANA:
        return SolanaConsent(chains.solana)
    return EvmConsent(chain, chains.ethereum if chain is Chain.ETHEREUM else chains.base)


def lookup_tables(chain: Chain, context: dict[str, str]) -> dict[str, tuple[str, ...]]:
    """The lookup tables a batch says it stands on, with what they must hold; Malformed if unreadable."""
    if chain is not Chain.SOLANA:
        return {}
    from chain.solana.escrow import EscrowTerms

    return dict(EscrowTerms.from_context(context).lookup_tables)


class EvmConsent:
    """The Safe of one EVM chain; `chain.evm.payouts.SafeTerms` pins everything."""

    def __init__(self, chain: Chain, config: EvmChainConfig) -> None:
        from chain.evm.payouts import SafeTerms

        self.chain = chain
        self.escrow = config.escrow
        self.signers = config.signers
        self.threshold = config.threshold
        self.terms = SafeTerms(
            network=EVM_NETWORKS[chain],
            safe=config.escrow,
            signers=config.signers,
            threshold=config.threshold,
            multi_send=config.multi_send,
        )

    def rebuild(self, lines: Sequence[PayoutLine], fence: str, context: dict[str, str]) -> Unsigned:
        return self.terms.rebuild(lines, fence, context)

    def verify(self, unsigned: Unsigned, approval: Approval) -> None:
        self.terms.verify(unsigned, approval)


class SolanaConsent:
    """The SPL multisig; its terms are pinned here, since a Solana batch's context carries its own."""

    chain = Chain.SOLANA

    def __init__(self, config: SolanaChainConfig) -> None:
        from chain.solana.escrow import EscrowTerms

        self.escrow = config.escrow
        self.signers = config.signers
        self.threshold = config.threshold
        self.terms = EscrowTerms(
            mint=config.usdc_mint,
            multisig=config.multisig,
            signers=config.signers,
            threshold=config.threshold,
            escrow=config.escrow,
            gas_payer=config.gas_payer,
            nonce_account=config.nonce_account,
        )

    def rebuild(self, lines: Sequence[PayoutLine], fence: str, context: dict[str, str]) -> Unsigned:
        from chain.solana import escrow

        # A lookup table is the batch's own; `escrow.build` refuses one with another content than the lines
        # need, and `signing` one that no provider of the signer's has confirmed.
        if replace(escrow.EscrowTerms.from_context(context), lookup_tables=()) != self.terms:
            raise ChainRefusal("the batch's multisig or accounts are not those of these settings")
        if context.get("kind") != escrow.PAYOUT:
            raise ChainRefusal(f"{context.get('kind')!r} is not a payout")
        return escrow.rebuild(lines, fence, context)

    def verify(self, unsigned: Unsigned, approval: Approval) -> None:
        from chain.solana import escrow

        escrow.verify(unsigned, approval)
