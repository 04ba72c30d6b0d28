"""A payout rail in memory, for tests and simulations: it loses answers, drops, reverts and lags on demand.

It behaves as a Safe does: one nonce, a payload that anybody may wrap, a transaction that reverts leaves the
nonce unspent.  Nothing in the product uses it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

from chain.errors import ChainBroken, ChainRefusal, Reverted, UnknownResult
from chain.networks import Chain
from chain.ports import Approval, Landed, PayoutLine, SignedTransaction, Unsigned

LABEL = "payload"


@dataclass(frozen=True, slots=True)
class Executed:
    """What happened to one payload."""

    tx: str
    height: int
    is_success: bool


@dataclass(slots=True)
class SimulatedRail:
    """A chain with one multisig escrow of three signers, two of which must sign."""

    chain: Chain = Chain.BASE
    escrow: str = "0x" + "e5" * 20
    signers: tuple[str, ...] = ("0x" + "a1" * 20, "0x" + "b2" * 20, "0x" + "c3" * 20)
    threshold: int = 2
    max_lines: int = 300
    escrow_micro: int = 10**12
    nonce: int = 7
    final_nonce: int = 7
    height: int = 100
    balances: dict[str, int] = field(default_factory=dict)
    blocked: set[str] = field(default_factory=set)
    """Addresses the token refuses to pay."""
    without_account: set[str] = field(default_factory=set)
    """Addresses that have no token account (as on Solana); a dry run opens one for each it is given."""
    opened: list[str] = field(default_factory=list)
    """For whom a dry run has opened one, at our cost."""
    meanwhile: list[Callable[[], Awaitable[None]]] = field(default_factory=list)
    """Done in the midst of the next dry runs, one each."""
    names_payees: bool = True
    is_paused: bool = False
    is_final_at_once: bool = True
    mempool: dict[str, bytes] = field(default_factory=dict)
    executed: dict[str, Executed] = field(default_factory=dict)
    """By payload digest, at the head."""
    finalized: dict[str, Executed] = field(default_factory=dict)
    sends: list[bytes] = field(default_factory=list)
    send_errors: list[Exception] = field(default_factory=list)
    """Raised by the next sends, one each, before the node takes the bytes."""
    answers_lost: int = 0
    """How many of the next sends are taken by the node although their answer is lost."""
    envelopes: int = 0

    # ── PayoutRail ────────────────────────────────────────────────────────────────────────────────────

    async def prepare(self, lines: Sequence[PayoutLine]) -> Unsigned:
        if self.is_paused:
            raise Reverted("the token is paused")
        self.opened += sorted({line.to for line in lines} & self.without_account)
        self.without_account -= {line.to for line in lines}
        if self.meanwhile:
            await self.meanwhile.pop(0)()
        refused = [line for line in lines if line.to in self.blocked]
        if refused:
            error = Reverted("the batch reverts")
            if self.names_payees:
                error.reasons = {line.payout_id: "blocked" for line in refused}  # type: ignore[attr-defined]  # as SafeRail's error has it
            raise error
        if sum(line.amount.n for line in lines) > self.escrow_micro:
            raise Reverted("the escrow holds less")
        return self.rebuild(lines, str(self.nonce), {"escrow": self.escrow})

    async def missing_accounts(self, lines: Sequence[PayoutLine]) -> frozenset[str]:
        return frozenset({line.to for line in lines} & self.without_account)

    def rebuild(self, lines: Sequence[PayoutLine], fence: str, context: dict[str, str]) -> Unsigned:
        if context != {"escrow": self.escrow}:
            raise ChainRefusal("another escrow")
        body = json.dumps([fence, *([line.payout_id, line.to, line.amount.n] for line in lines)])
        message = hashlib.sha256(body.encode()).digest()
        return Unsigned(self.chain, fence, tuple(lines), {LABEL: message}, dict(context))

    def require_ours(self, context: Mapping[str, str]) -> None:
        if context != {"escrow": self.escrow}:
            raise ChainBroken("another escrow")

    def verify(self, unsigned: Unsigned, approval: Approval) -> None:
        if approval.signer not in self.signers or approval != self.approve(unsigned, approval.signer):
            raise ChainRefusal(f"{approval.signer} did not sign this")

    async def assemble(self, unsigned: Unsigned, approvals: Sequence[Approval]) -> SignedTransaction:
        for approval in approvals:
            self.verify(unsigned, approval)
        if len({approval.signer for approval in approvals}) < self.threshold:
            raise ChainRefusal("too few approvals")
        if int(unsigned.fence) != self.nonce or any(line.to in self.blocked for line in unsigned.lines):
            raise Reverted("the multisig would refuse")
        self.envelopes += 1
        body = {
            "envelope": self.envelopes,
            "fence": unsigned.fence,
            "digest": unsigned.messages[LABEL].hex(),
            "lines": [[line.to, line.amount.n] for line in unsigned.lines],
        }
        raw = json.dumps(body).encode()
        return SignedTransaction(raw, hashlib.sha256(raw).hexdigest(), unsigned.fence)

    async def broadcast(self, signed: SignedTransaction) -> None:
        self.sends.append(signed.raw)
        if self.send_errors:
            raise self.send_errors.pop(0)
        self.mempool[signed.tx] = signed.raw
        if self.answers_lost:
            self.answers_lost -= 1
            raise UnknownResult("the answer was lost")

    async def landed(self, signed: SignedTransaction) -> Landed | None:
        digest = json.loads(signed.raw)["digest"]
        found = self.finalized.get(digest)
        return (
            None
            if found is None
            else Landed(found.tx, found.height, f"block-{found.height}", found.is_success)
        )

    async def is_fence_spent(self, fence: str) -> bool:
        return self.final_nonce > int(fence)

    # ── what a test does to the chain ─────────────────────────────────────────────────────────────────

    def approve(self, unsigned: Unsigned, signer: str) -> Approval:
        """A signer's signature, as his keystore would make it."""
        signature = hashlib.sha256(signer.encode() + unsigned.messages[LABEL]).digest()
        return Approval(signer, {LABEL: signature})

    def mine(self) -> None:
        """Execute what waits, each payload at most once."""
        waiting, self.mempool = list(self.mempool.items()), {}
        for tx, raw in waiting:
            self.height += 1
            self._execute(tx, json.loads(raw))
        if self.is_final_at_once:
            self.finalize()

    def finalize(self) -> None:
        """Make the head final."""
        self.finalized = dict(self.executed)
        self.final_nonce = self.nonce

    def spend_fence(self) -> None:
        """The owners execute something else."""
        self.nonce += 1
        if self.is_final_at_once:
            self.finalize()

    def _execute(self, tx: str, body: dict[str, object]) -> None:
        lines = body["lines"]
        if not isinstance(lines, list) or int(str(body["fence"])) != self.nonce or self.is_paused:
            return  # reverts: the nonce stays
        if any(to in self.blocked for to, _ in lines):
            return
        self.nonce += 1
        for to, amount in lines:
            self.balances[to] = self.balances.get(to, 0) + amount
            self.escrow_micro -= amount
        self.executed[str(body["digest"])] = Executed(tx, self.height, is_success=True)
