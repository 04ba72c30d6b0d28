"""Paying a batch on an EVM chain: USDC out of the 2-of-3 Safe.

The fence is the Safe's nonce: of all SafeTx signed over one nonce, the chain executes one.  Whether a
batch was paid is read from the Safe's own `ExecutionSuccess(safeTxHash)` event, never from the fate of
the transaction we sent: signed calldata is public once sent, anybody may wrap it in a transaction of
his own, and ours would then revert although the payees were paid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec
from eth_account.typed_transactions.typed_transaction import TypedTransaction
from hexbytes import HexBytes

from chain import payout_quorum
from chain.errors import ChainBroken, ChainRefusal, Malformed, Reverted, WrongChain
from chain.evm import abi, gas
from chain.evm.addresses import parse_address, parse_payable
from chain.evm.reader import RawLog
from chain.evm.rpc import BATCH_MAX, Call, JsonRpc, data, quantity
from chain.evm.safe import MULTI_SEND_CALL_ONLY, BatchTransaction, batch_transaction, from_calldata
from chain.evm.signatures import recover
from chain.networks import SAFE_VERSION_MIN, Chain, EvmNetwork
from chain.payout_quorum import Sight
from chain.ports import Approval, Landed, PayoutLine, SignedTransaction, Unsigned

LINES_MAX: Final = 300
"""9.1 million gas to new holders; 500 measured 15.2, too near the 16.8 that a transaction may have."""
LABEL: Final = "safe_tx_hash"
SEARCH_BLOCKS: Final = 5_000
SEARCH_BLOCKS_MAX: Final = 700_000
"""How far back an execution by a stranger's transaction is looked for: two weeks of Base."""


class PayeesRefused(Reverted):
    """The token would refuse to pay these; the others can be paid without them."""

    def __init__(self, reasons: dict[str, str]) -> None:
        super().__init__("; ".join(f"payout {payout}: {why}" for payout, why in reasons.items()))
        self.reasons = reasons
        """By payout id."""


class EscrowTooSmall(Reverted):
    """The Safe holds less than the batch pays."""


class TokenPaused(Reverted):
    """Circle has paused USDC: nothing moves until it is unpaused."""


class WrongSafe(ChainBroken):
    """The Safe on chain is too old, or its owners or threshold are not the configured ones."""


class _RawReceipt(msgspec.Struct):
    blockNumber: str  # noqa: N815  the protocol's spelling
    blockHash: str  # noqa: N815  the protocol's spelling
    logs: list[RawLog]


@dataclass(frozen=True, slots=True)
class SafeTerms:
    """The Safe as the signer knows it, from his own settings: all that rebuilding and verifying need."""

    network: EvmNetwork
    safe: str
    signers: tuple[str, ...]
    threshold: int
    multi_send: str = MULTI_SEND_CALL_ONLY

    def context(self) -> dict[str, str]:
        """What a digest depends on besides lines and nonce."""
        return {
            "chain_id": str(self.network.chain_id),
            "safe": self.safe,
            "usdc": self.network.usdc,
            "multi_send": self.multi_send,
        }

    def transaction(self, lines: Sequence[PayoutLine], fence: str) -> BatchTransaction:
        """The one SafeTx that pays these lines at this nonce; ChainRefusal for lines nobody should sign."""
        self._check(lines)
        if not fence.isascii() or not fence.isdecimal():
            raise ChainRefusal(f"{fence!r} is not a Safe nonce")
        return batch_transaction(
            lines,
            chain_id=self.network.chain_id,
            safe=self.safe,
            usdc=self.network.usdc,
            multi_send=self.multi_send,
            nonce=int(fence),
        )

    def rebuild(self, lines: Sequence[PayoutLine], fence: str, context: dict[str, str]) -> Unsigned:
        """Rebuild, without I/O, what must be signed.

        A context that names another chain, Safe, token or delegatecall target than our own settings is
        a ChainRefusal: an export can never choose them.
        """
        if context != self.context():
            raise ChainRefusal(f"the batch is for {context}, but these signers' Safe is {self.context()}")
        digest = self.transaction(lines, fence).digest()
        return Unsigned(self.network.chain, fence, tuple(lines), {LABEL: digest}, self.context())

    def verify(self, unsigned: Unsigned, approval: Approval) -> None:
        """Raise ChainRefusal unless the named signer, an owner, signed the digest of these very lines."""
        if approval.signer not in self.signers:
            raise ChainRefusal(f"{approval.signer} is not an owner of {self.safe}")
        if approval.signatures.keys() != {LABEL}:
            raise ChainRefusal(f"{approval.signer} signed {sorted(approval.signatures)}, not {LABEL}")
        expected = self.rebuild(unsigned.lines, unsigned.fence, unsigned.context)
        if unsigned.messages != expected.messages:
            raise ChainRefusal("the message is not the digest of the batch's lines")
        signature = approval.signatures[LABEL]
        if signature[64:] not in (b"\x1b", b"\x1c"):
            raise ChainRefusal("the Safe reads an owner's EIP-712 signature only with v 27 or 28")
        signer = recover(expected.messages[LABEL], signature)
        if signer != approval.signer:
            raise ChainRefusal(f"signature by {signer}, not by {approval.signer}")

    def _check(self, lines: Sequence[PayoutLine]) -> None:
        if not 0 < len(lines) <= LINES_MAX:
            raise ChainRefusal(f"a batch has 1..{LINES_MAX} payouts, not {len(lines)}")
        if len({line.payout_id for line in lines}) != len(lines):
            raise ChainRefusal("a payout stands in the batch twice")
        for line in lines:
            if line.amount.n == 0:
                raise ChainRefusal(f"payout {line.payout_id} pays nothing")
            if parse_payable(line.to, (self.safe, self.multi_send)) != line.to:
                raise ChainRefusal(f"payout {line.payout_id}: {line.to} is not canonically spelt")


class SafeRail:
    """`chain.ports.PayoutRail` of one Safe."""

    def __init__(
        self, terms: SafeTerms, rpc: JsonRpc, gas_payer: gas.GasPayer, *, witnesses: Sequence[JsonRpc] = ()
    ) -> None:
        """`witnesses`: further providers, asked too what has become of a batch (`payout_quorum`)."""
        self.terms = terms
        self.chain: Chain = terms.network.chain
        self.escrow = terms.safe
        self.signers = terms.signers
        self.threshold = terms.threshold
        self._rpc = rpc
        self._providers = (rpc, *witnesses)
        self._gas_payer = gas_payer
        self._is_checked = False
        """Whether this process has seen the Safe as configured; nothing is sent before."""
        self._spent: str | None = None
        """The fence just seen spent: whoever then shows it unspent is behind, and knows nothing."""
        self._on_our_network: set[int] = set()
        """Providers (their objects' ids) that were asked for their chain id."""

    async def prepare(self, lines: Sequence[PayoutLine]) -> Unsigned:
        """Dry-run every payment from the Safe and freeze what will be signed.

        Raises TokenPaused, EscrowTooSmall or PayeesRefused (all Reverted); the last names every payout
        the token would refuse, so that the planner can leave out just those.  WrongSafe as
        `check_escrow`.
        """
        usdc, safe = abi.load("usdc"), abi.load("safe")
        token, terms = self.terms.network.usdc, self.terms
        fence = "0"
        terms.transaction(lines, fence)  # refuse bad lines before asking the node
        await self.check_escrow()
        paused, balance, nonce = (
            answer.value(str)
            for answer in await self._rpc.batch(
                [
                    _view(token, usdc["paused"].encode()),
                    _view(token, usdc["balanceOf"].encode(terms.safe)),
                    _view(terms.safe, safe["nonce"].encode()),
                ]
            )
        )
        if usdc["paused"].decode(data(paused))[0]:
            raise TokenPaused(f"USDC is paused on {self.chain}")
        held, owed = usdc["balanceOf"].decode(data(balance))[0], sum(line.amount.n for line in lines)
        if held < owed:
            raise EscrowTooSmall(f"the batch pays {owed} micro-USDC, the Safe holds {held}")
        if reasons := await self._refusals(lines):
            raise PayeesRefused(reasons)
        fence = str(safe["nonce"].decode(data(nonce))[0])
        return terms.rebuild(lines, fence, terms.context())

    def rebuild(self, lines: Sequence[PayoutLine], fence: str, context: dict[str, str]) -> Unsigned:
        """See `SafeTerms.rebuild`."""
        return self.terms.rebuild(lines, fence, context)

    def verify(self, unsigned: Unsigned, approval: Approval) -> None:
        """See `SafeTerms.verify`."""
        self.terms.verify(unsigned, approval)

    async def assemble(self, unsigned: Unsigned, approvals: Sequence[Approval]) -> SignedTransaction:
        """Put threshold approvals into `execTransaction`, dry-run it and sign it as gas payer.

        Raises ChainRefusal for too few distinct or wrong approvals, WrongSafe as `check_escrow`, Reverted
        if the Safe would refuse.
        May be called again with the same approvals (OuterNonceTaken, a fee spike): the fence holds.
        """
        for approval in approvals:
            self.verify(unsigned, approval)
        by_signer = {int(approval.signer, 16): approval.signatures[LABEL] for approval in approvals}
        if len(by_signer) < self.threshold:
            raise ChainRefusal(f"{len(by_signer)} distinct approvals of {self.threshold}")
        ascending = [by_signer[signer] for signer in sorted(by_signer)][: self.threshold]
        transaction = self.terms.transaction(unsigned.lines, unsigned.fence)
        await self.check_escrow()  # days may lie between planning and signing
        outer = await self._gas_payer.wrap(self.terms.safe, transaction.exec_calldata(b"".join(ascending)))
        return SignedTransaction(outer.raw, outer.tx, unsigned.fence)

    async def replace(self, signed: SignedTransaction) -> SignedTransaction | None:
        """The same SafeTx for a better fee on the same outer nonce; None if that nonce is used by now."""
        outer = await self._gas_payer.replace(signed.raw)
        return None if outer is None else SignedTransaction(outer.raw, outer.tx, signed.fence)

    async def broadcast(self, signed: SignedTransaction) -> None:
        """Send the same bytes to all providers; see `gas.broadcast` for what it raises, besides WrongSafe."""
        if not self._is_checked:  # bytes on record from before a restart
            await self.check_escrow()
        await payout_quorum.sent([gas.broadcast(rpc, signed.raw, signed.tx) for rpc in self._providers])

    def require_ours(self, context: Mapping[str, str]) -> None:
        """Raise WrongSafe where a batch was frozen for another Safe: its fence is that one's nonce."""
        if context.get("safe") != self.terms.safe:
            raise WrongSafe(f"the batch is of Safe {context.get('safe')}, configured is {self.terms.safe}")

    async def check_escrow(self) -> None:
        """Raise WrongSafe unless the Safe on chain is young enough and obeys whom our settings name (A36)."""
        found, terms = await read_terms(self.terms.network, self.terms.safe, self._rpc), self.terms
        differs: list[str] = []
        if sorted(found.signers) != sorted(terms.signers):  # the Safe lists them in an order of its own
            differs.append(f"its owners are {sorted(found.signers)}, configured {sorted(terms.signers)}")
        if found.threshold != terms.threshold:
            differs.append(f"its threshold is {found.threshold}, configured {terms.threshold}")
        if differs:
            raise WrongSafe(f"Safe {terms.safe} on {self.chain}: {'; '.join(differs)}")
        self._is_checked = True

    async def is_fence_spent(self, fence: str) -> bool:
        """Tell whether, at finality, the Safe's nonce is past `fence` (`payout_quorum.is_spent`).

        Before calling a batch EXPIRED, ask this first and `landed` second: finality may move between.
        """
        is_spent = await payout_quorum.is_spent([self._is_past(rpc, int(fence)) for rpc in self._providers])
        self._spent = fence if is_spent else None
        return is_spent

    async def landed(self, signed: SignedTransaction) -> Landed | None:
        """The execution of this batch at finality, by whichever transaction; None while there is none.

        How many providers must say so is in `payout_quorum.landed`.  WrongSafe where the configured Safe is
        not the one it was signed for.
        `tx` may differ from `signed.tx`: see the module's docstring.  A transaction of ours that
        reverted is no fact about the batch, whose signatures stay usable until the fence is spent.
        """
        digest = "0x" + self._payload(signed).digest().hex()
        sights = [self._sight(rpc, signed, digest) for rpc in self._providers]
        return await payout_quorum.landed(sights, is_spent=signed.fence == self._spent)

    async def _sight(self, rpc: JsonRpc, signed: SignedTransaction, digest: str) -> Sight:
        await self._require_network(rpc)
        final, nonce = await self._final(rpc)
        if nonce <= int(signed.fence):
            return Sight(is_past=False, landed=None)
        by_ours = await self._by_receipt(rpc, signed.tx, digest, final)
        return Sight(is_past=True, landed=by_ours or await self._by_search(rpc, digest, final))

    async def _is_past(self, rpc: JsonRpc, nonce: int) -> bool:
        await self._require_network(rpc)
        return await self._nonce_at(rpc, "finalized") > nonce

    async def _require_network(self, rpc: JsonRpc) -> None:
        """WrongChain for a provider of another network, where a Safe may have the same address."""
        if id(rpc) in self._on_our_network:
            return
        chain_id = quantity(await rpc.call("eth_chainId", shape=str))
        if chain_id != self.terms.network.chain_id:
            raise WrongChain(f"a provider serves chain id {chain_id}, not that of {self.chain}")
        self._on_our_network.add(id(rpc))

    async def _refusals(self, lines: Sequence[PayoutLine]) -> dict[str, str]:
        """Why the token would not pay, by payout id: the blacklist, then each transfer on its own."""
        usdc, token = abi.load("usdc"), self.terms.network.usdc
        reasons: dict[str, str] = {}
        for start in range(0, len(lines), BATCH_MAX // 2):
            some = lines[start : start + BATCH_MAX // 2]
            calls = [_view(token, usdc["isBlacklisted"].encode(line.to)) for line in some]
            for line in some:
                transfer = usdc["transfer"].encode(line.to, line.amount.n)
                calls.append(_view(token, transfer, sender=self.terms.safe))
            answers = await self._rpc.batch(calls)
            for line, listed, paid in zip(some, answers, answers[len(some) :], strict=False):
                if usdc["isBlacklisted"].decode(data(listed.value(str)))[0]:
                    reasons[line.payout_id] = f"{line.to} is blacklisted by Circle"
                    continue
                try:
                    is_paid = usdc["transfer"].decode(data(paid.value(str)))[0]
                except Reverted as e:
                    reasons[line.payout_id] = f"{line.to}: {e}"
                else:
                    if not is_paid:
                        reasons[line.payout_id] = f"{line.to}: the token answers false"
        return reasons

    async def _nonce_at(self, rpc: JsonRpc, block: str) -> int:
        nonce = abi.load("safe")["nonce"]
        call = _view(self.terms.safe, nonce.encode(), block=block)
        returned = (await rpc.batch([call]))[0].value(str)
        return int(nonce.decode(data(returned))[0])

    async def _final(self, rpc: JsonRpc) -> tuple[int, int]:
        """(finalized height, Safe nonce there), of one and the same block."""
        block = await rpc.call("eth_getBlockByNumber", "finalized", False, shape=dict[str, object])
        height = quantity(str(block.get("number")))
        return height, await self._nonce_at(rpc, hex(height))

    def _payload(self, signed: SignedTransaction) -> BatchTransaction:
        """The SafeTx inside bytes that we signed; WrongSafe if they are another Safe's.

        Its fence would be compared with this Safe's nonce, and a batch called unpaid that may be paid.
        """
        outer = TypedTransaction.from_bytes(HexBytes(signed.raw)).as_dict()
        if (safe := "0x" + bytes(outer["to"]).hex()) != self.terms.safe.lower():
            raise WrongSafe(f"the batch was signed for Safe {safe}, configured is {self.terms.safe}")
        return from_calldata(
            bytes(HexBytes(outer["data"])),
            chain_id=self.terms.network.chain_id,
            safe=self.terms.safe,
            nonce=int(signed.fence),
        )

    async def _by_receipt(self, rpc: JsonRpc, tx: str, digest: str, final: int) -> Landed | None:
        receipt = await rpc.call("eth_getTransactionReceipt", tx, shape=_RawReceipt | None)  # type: ignore[arg-type]  # a union is a shape too
        if receipt is None or quantity(receipt.blockNumber) > final:
            return None
        return self._execution(receipt.logs, digest)

    async def _by_search(self, rpc: JsonRpc, digest: str, final: int) -> Landed | None:
        topics = abi.load("safe").topics
        kinds = [topics["ExecutionSuccess"], topics["ExecutionFailure"]]
        for end in range(final, max(final - SEARCH_BLOCKS_MAX, -1), -SEARCH_BLOCKS):
            where = {
                "fromBlock": hex(max(end - SEARCH_BLOCKS + 1, 0)),
                "toBlock": hex(end),
                "address": self.terms.safe,
                "topics": [kinds],  # not the digest: a Safe before 1.4 has it in the data
            }
            logs = await rpc.call("eth_getLogs", where, shape=list[RawLog])
            if found := self._execution(logs, digest):
                return found
        return None

    def _execution(self, logs: Sequence[RawLog], digest: str) -> Landed | None:
        topics = abi.load("safe").topics
        for log in logs:
            if log.address.lower() != self.terms.safe.lower() or _executed(log) != digest:
                continue
            if log.topics[:1] in ([topics["ExecutionSuccess"]], [topics["ExecutionFailure"]]):
                return Landed(
                    tx=log.transactionHash,
                    height=quantity(log.blockNumber),
                    block_hash=log.blockHash,
                    is_success=log.topics[0] == topics["ExecutionSuccess"],
                )
        return None


def _executed(log: RawLog) -> str:
    """The hash an execution's log names: a topic, or with Safes before 1.4 the data's first word."""
    return log.topics[1] if len(log.topics) > 1 else log.data[:66]


def _view(to: str, calldata: bytes, *, sender: str | None = None, block: str = "latest") -> Call:
    call = {"to": to, "data": "0x" + calldata.hex()}
    return Call("eth_call", (call | {"from": sender} if sender else call, block))


async def read_terms(network: EvmNetwork, safe: str, rpc: JsonRpc) -> SafeTerms:
    """Ask the chain for a Safe's owners and threshold; WrongSafe if it is older than SAFE_VERSION_MIN.

    For setting up and for `SafeRail.check_escrow`; a signer keeps the result in his own settings, so that
    the chain he is shown later cannot change it.
    """
    contract = abi.load("safe")
    names = ("VERSION", "getOwners", "getThreshold")
    answers = await rpc.batch([_view(safe, contract[name].encode()) for name in names])
    values = [contract[name].decode(data(a.value(str)))[0] for name, a in zip(names, answers, strict=True)]
    version, owners, threshold = str(values[0]), values[1], int(values[2])
    try:
        numbers = tuple(int(part) for part in version.partition("+")[0].split("."))
    except ValueError as e:
        raise Malformed(f"Safe version {version!r}") from e
    if numbers < SAFE_VERSION_MIN:
        oldest = ".".join(map(str, SAFE_VERSION_MIN))
        raise WrongSafe(f"Safe {safe} on {network.chain} is version {version}, older than {oldest}")
    return SafeTerms(network, parse_address(safe), tuple(parse_address(o) for o in owners), threshold)
