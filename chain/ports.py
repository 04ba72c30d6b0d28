"""The only I/O the chain package's machines may do, as protocols.

Adapters in `chain.evm` and `chain.solana` implement them; watchers and the settler in
`marketplace` are written against them and never import web3 or solana.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from chain.networks import Chain
from chain.units import Micro


@dataclass(frozen=True, slots=True)
class Header:
    """One block (EVM) or slot that holds a block (Solana)."""

    height: int
    hash: str
    parent_hash: str
    parent_height: int
    """`height - 1` on EVM; on Solana slots may be skipped, so the parent's slot."""
    time_s: int


@dataclass(frozen=True, slots=True)
class TransferSeen:
    """One inbound movement of the pinned USDC token to an account we were told to watch.

    `key` is the identity within the chain: ``"<tx>:<log index>"`` on EVM, ``"<signature>:<token account>"``
    on Solana.  `references` are the other account keys of a Solana transaction that the caller asked about.
    """

    chain: Chain
    key: str
    tx: str
    height: int
    block_hash: str
    to: str
    """The watched address: forwarder or Safe (EVM, checksummed); token account (Solana)."""
    sender: str
    amount: Micro
    references: tuple[str, ...] = ()
    also_sent: tuple[str, ...] = ()
    """Whoever else's USDC lessened in the same transaction (Solana, where one moves many people's)."""


@dataclass(frozen=True, slots=True)
class Departure:
    """USDC that left a watched token account (Solana), by balance difference; `key` is "<tx>:<account>".

    EVM readers report none: a forwarder can pay nobody but the escrow, whose inbound log names it.
    """

    tx: str
    key: str
    height: int
    block_hash: str
    account: str
    amount: Micro


@dataclass(frozen=True, slots=True)
class AccountChange:
    """Somebody did to a watched token account (Solana) what only its owner's key can do."""

    what: Literal["owner", "closed"]
    tx: str
    height: int
    account: str
    detail: str

    @property
    def alarm(self) -> str:
        """Its name: what a person acknowledges."""
        return f"{self.what}:{self.tx}:{self.account}"


@dataclass(frozen=True, slots=True)
class ForeignTransfer:
    """A token we do not take, on one of the chain's listed look-alikes, sent to a watched address."""

    token: str
    """Contract or mint."""
    name: str
    transfer: TransferSeen
    """`amount` in the token's own smallest unit."""


@dataclass(frozen=True, slots=True)
class BlockFacts:
    """What one block said of what we watch."""

    header: Header
    inbound: tuple[TransferSeen, ...]
    outbound: tuple[Departure, ...] = ()
    foreign: tuple[ForeignTransfer, ...] = ()
    changes: tuple[AccountChange, ...] = ()


class WatchSet(Protocol):
    """Which addresses matter.  Membership is asked for every transfer on the chain: O(1), no I/O."""

    def is_watched(self, address: str) -> bool:
        """Tell whether transfers to `address` (EVM in lower case, or Solana token account) are ours."""
        ...

    def is_reference(self, key: str) -> bool:
        """Tell whether `key` is the reference of an open Solana Pay intent; always False on EVM."""
        ...


class ChainReader(Protocol):
    """Read side of one chain, already agreed by the configured number of providers."""

    chain: Chain

    async def check_identity(self) -> None:
        """Raise WrongChain unless the node serves the configured network."""
        ...

    async def head(self) -> Header:
        """The newest block."""
        ...

    async def final(self) -> Header:
        """The block at the node's own `finalized` tag / commitment."""
        ...

    async def header_at(self, height: int) -> Header | None:
        """The canonical block at `height`; None if there is none (yet, or a skipped slot)."""
        ...

    async def blocks(self, start: int, end: int, watch: WatchSet) -> list[BlockFacts]:
        """Every block in start..end inclusive, ascending, with its watched transfers.

        Contiguous by parent hash within the answer, else RpcUnavailable (the chain moved while
        reading; ask again).
        """
        ...

    async def token_code(self, height: int) -> str:
        """What runs behind the pinned USDC at `height`: the proxy's implementation; "" on Solana."""
        ...

    async def usdc_balance(self, address: str, *, height: int | None = None) -> Micro:
        """USDC at `address` (EVM) or in token account `address` (Solana).

        At `height` where the chain can say (EVM); on Solana at `finalized`, `height` must be None.
        """
        ...


@dataclass(frozen=True, slots=True)
class PayoutLine:
    """One recipient of a settlement batch, in the batch's frozen order."""

    payout_id: str
    to: str
    amount: Micro


@dataclass(frozen=True, slots=True)
class Unsigned:
    """What signers sign for one batch.

    `fence` makes old signed bytes unusable: the Safe nonce (decimal) or the durable nonce value (base58).
    `messages` are the byte strings of which a signer signs each that names him; keys are stable labels
    (EVM: one, ``"safe_tx_hash"``; Solana: one per signer combination, ``"<pubkey>+<pubkey>"``).
    `context` is everything needed to rebuild `messages` from `lines` offline (JSON-serialisable).
    """

    chain: Chain
    fence: str
    lines: tuple[PayoutLine, ...]
    messages: dict[str, bytes]
    context: dict[str, str]


@dataclass(frozen=True, slots=True)
class Approval:
    """One signer's consent: signatures by message label."""

    signer: str
    """EVM address or base58 public key."""
    signatures: dict[str, bytes]


@dataclass(frozen=True, slots=True)
class SignedTransaction:
    """Bytes ready to be sent; durable before the first send."""

    raw: bytes
    tx: str
    """The transaction's identity on its chain (hash or signature)."""
    fence: str


@dataclass(frozen=True, slots=True)
class Landed:
    """A transaction at finality."""

    tx: str
    height: int
    block_hash: str
    is_success: bool


class PayoutRail(Protocol):
    """How one chain pays a batch from the multisig escrow."""

    chain: Chain
    escrow: str
    """Address whose USDC balance is the escrow (Safe, or the multisig's token account)."""
    signers: tuple[str, ...]
    threshold: int

    async def prepare(self, lines: Sequence[PayoutLine]) -> Unsigned:
        """Dry-run the payment and freeze what will be signed; raises Reverted naming the reason."""
        ...

    def rebuild(self, lines: Sequence[PayoutLine], fence: str, context: dict[str, str]) -> Unsigned:
        """Rebuild, without I/O, what must be signed.  Signers and the settler compare it to the export."""
        ...

    def require_ours(self, context: Mapping[str, str]) -> None:
        """Raise ChainBroken where a batch with this context was frozen for another escrow or fence."""
        ...

    def verify(self, unsigned: Unsigned, approval: Approval) -> None:
        """Raise ChainRefusal unless every signature is the named signer's, over these messages."""
        ...

    async def assemble(self, unsigned: Unsigned, approvals: Sequence[Approval]) -> SignedTransaction:
        """Put threshold approvals and the gas payer's signature together.  Sends nothing."""
        ...

    async def broadcast(self, signed: SignedTransaction) -> None:
        """Send the same bytes; already known or already landed is success.  UnknownResult on doubt."""
        ...

    async def landed(self, signed: SignedTransaction) -> Landed | None:
        """The transaction at finality, or None."""
        ...

    async def is_fence_spent(self, fence: str) -> bool:
        """Tell whether, at finality, the fence has been used (by this transaction or another)."""
        ...


@dataclass(frozen=True, slots=True)
class Sweep:
    """Deposit addresses emptied into the escrow by one transaction at finality."""

    tx: str
    height: int
    moved: tuple[tuple[str, Micro], ...]
    """(deposit address or token account, amount)."""
