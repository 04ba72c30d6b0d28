"""What a SafeRail believes of the Safe it pays from: its version, owners, threshold and logs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import pytest
from eth_abi.abi import encode

from chain.errors import Malformed, RpcUnavailable, WrongChain
from chain.evm import abi, gas
from chain.evm.keystore import sign_digest
from chain.evm.payouts import LABEL, SafeRail, SafeTerms, WrongSafe
from chain.evm.rpc import Answer, Call, JsonRpc, decode
from chain.localnet.evm import address_of
from chain.networks import BASE
from chain.ports import Approval, Landed, PayoutLine, SignedTransaction, Unsigned
from chain.units import Micro

KEYS = [bytes([n]) * 32 for n in (1, 2, 3)]
OWNERS = tuple(address_of(key) for key in KEYS)
SAFE = "0xF7DE45F93B84b9eC7B92373bF381aD7366f22C08"
TERMS = SafeTerms(BASE, SAFE, OWNERS, 2)
LINES = (PayoutLine("p1", "0x" + "11" * 20, Micro(5)),)
UNSIGNED: Unsigned = TERMS.rebuild(LINES, "3", TERMS.context())
APPROVALS = [Approval(OWNERS[n], {LABEL: sign_digest(KEYS[n], UNSIGNED.messages[LABEL])}) for n in (0, 2)]
FINAL = 60
SAFE_ABI = abi.load("safe")


def as_now(kind: str, digest: str) -> dict[str, Any]:
    """How a Safe from 1.4 on logs an execution."""
    return {"topics": [SAFE_ABI.topics[kind], digest], "data": "0x" + "00" * 32}


def as_before_1_4(kind: str, digest: str) -> dict[str, Any]:
    """The same event without `indexed` (gnosis_safe.json of safe-deployments 1.3.0)."""
    return {"topics": [SAFE_ABI.topics[kind]], "data": digest + "00" * 32}


@dataclass
class Node(JsonRpc):
    """A node with one Safe, which answers what `SafeRail` asks."""

    version: str = "1.4.1"
    owners: Sequence[str] = tuple(reversed(OWNERS))
    threshold: int = 2
    nonce: int = 3
    logs: list[dict[str, Any]] = field(default_factory=list)
    is_down: bool = False
    chain_id: int = BASE.chain_id
    refuses_to_send: bool = False
    version_bytes: bytes | None = None
    sent: list[str] = field(default_factory=list)

    async def batch(self, calls: Sequence[Call]) -> list[Answer]:
        if self.is_down:
            raise RpcUnavailable("down")
        return [Answer(call.method, msgspec.json.encode(self.answer(call)), None) for call in calls]

    async def call(self, method: str, *params: Any, shape: Any) -> Any:
        return decode((await self.batch([Call(method, params)]))[0].raw, shape, method)

    def answer(self, call: Call) -> Any:
        match call.method:
            case "eth_call":
                return "0x" + self.view(bytes.fromhex(call.params[0]["data"][2:])).hex()
            case "eth_chainId":
                return hex(self.chain_id)
            case "eth_getBlockByNumber":
                return {"number": hex(FINAL)}
            case "eth_getTransactionReceipt":
                logs = [log for log in self.logs if log["transactionHash"] == call.params[0]]
                return {"blockNumber": "0x7", "blockHash": "0xb", "logs": logs} if logs else None
            case "eth_getLogs":
                return [log for log in self.logs if matches(log["topics"], call.params[0]["topics"])]
            case "eth_estimateGas" | "eth_getTransactionCount":
                return "0x1"
            case "eth_feeHistory":
                return {"baseFeePerGas": ["0x1"], "reward": [["0x1"]]}
            case "eth_sendRawTransaction" if self.refuses_to_send:
                raise RpcUnavailable("takes nothing")
            case "eth_sendRawTransaction":
                self.sent.append(call.params[0])
                return "0x"
        raise AssertionError(call.method)

    def view(self, calldata: bytes) -> bytes:
        usdc = abi.load("usdc")
        if calldata[:4] == SAFE_ABI["VERSION"].selector and self.version_bytes is not None:
            return encode(["bytes"], [self.version_bytes])
        answers: dict[bytes, tuple[str, Any]] = {
            SAFE_ABI["VERSION"].selector: ("string", self.version),
            SAFE_ABI["getOwners"].selector: ("address[]", self.owners),
            SAFE_ABI["getThreshold"].selector: ("uint256", self.threshold),
            SAFE_ABI["nonce"].selector: ("uint256", self.nonce),
            usdc["paused"].selector: ("bool", False),
            usdc["balanceOf"].selector: ("uint256", 10**6),
            usdc["isBlacklisted"].selector: ("bool", False),
            usdc["transfer"].selector: ("bool", True),
        }
        kind, value = answers[calldata[:4]]
        return encode([kind], [value])

    def executes(self, log: dict[str, Any], *, tx: str) -> None:
        self.nonce += 1
        at = {"blockNumber": "0x7", "blockHash": "0xb", "transactionHash": tx, "logIndex": "0x0"}
        self.logs.append({"address": SAFE.lower(), **log, **at})


def matches(topics: list[str], wanted: list[str | list[str]]) -> bool:
    """What a node calls a match: position by position, and a log with too few topics is none."""
    each = [one if isinstance(one, list) else [one] for one in wanted]
    return len(topics) >= len(each) and all(topic in one for topic, one in zip(topics, each, strict=False))


def rail_on(node: Node, terms: SafeTerms = TERMS, *, witnesses: Sequence[Node] = ()) -> SafeRail:
    payer = gas.GasPayer(node, BASE.chain_id, bytes([9]) * 32)
    return SafeRail(terms, node, payer, witnesses=witnesses)


@pytest.fixture
def node() -> Node:
    return Node()


async def signed_bytes() -> SignedTransaction:
    return await rail_on(Node()).assemble(UNSIGNED, APPROVALS)


@pytest.mark.parametrize("form", [as_now, as_before_1_4])
@pytest.mark.parametrize("kind", ["ExecutionSuccess", "ExecutionFailure"])
@pytest.mark.parametrize("is_ours", [True, False], ids=["by us", "by a stranger"])
async def test_an_execution_is_seen_in_either_form_of_its_log(
    node: Node, form: Any, kind: str, is_ours: bool
) -> None:
    """A spent fence with an execution we do not see is called EXPIRED, and the batch is paid again."""
    signed = await signed_bytes()
    tx = signed.tx if is_ours else "0x" + "57" * 32
    node.executes(form(kind, "0x" + UNSIGNED.messages[LABEL].hex()), tx=tx)
    landed = await rail_on(node).landed(signed)
    assert landed == Landed(tx=tx, height=7, block_hash="0xb", is_success=kind == "ExecutionSuccess")


@pytest.mark.parametrize("form", [as_now, as_before_1_4])
async def test_another_batchs_execution_is_not_ours(node: Node, form: Any) -> None:
    node.executes(form("ExecutionSuccess", "0x" + "ab" * 32), tx="0x" + "57" * 32)
    assert await rail_on(node).landed(await signed_bytes()) is None


async def test_a_batch_of_another_safe_is_not_looked_for_at_this_one(node: Node) -> None:
    """Somebody changed the escrow in the chains file while it was on its way."""
    signed = await signed_bytes()
    node.nonce = 9
    with pytest.raises(WrongSafe, match="signed for"):
        await rail_on(node, replace(TERMS, safe="0x" + "22" * 20)).landed(signed)


@pytest.mark.parametrize("liar", [0, 1, 2])
async def test_a12_one_provider_cannot_call_a_paid_batch_unpaid(liar: int) -> None:
    """The liar shows the spent nonce and hides the execution: believed, the batch would be paid again."""
    signed, nodes = await signed_bytes(), [Node(), Node(), Node()]
    for node in nodes:
        node.executes(as_now("ExecutionSuccess", "0x" + UNSIGNED.messages[LABEL].hex()), tx=signed.tx)
    nodes[liar].logs.clear()
    rail = rail_on(nodes[0], witnesses=nodes[1:])
    assert await rail.is_fence_spent(signed.fence)
    landed = await rail.landed(signed)
    assert landed is not None
    assert landed.tx == signed.tx
    nodes[liar - 1].is_down = True
    with pytest.raises(RpcUnavailable, match="1 of 3 providers saw the batch land"):
        await rail.landed(signed)
    nodes[liar - 2].is_down = True  # now the liar alone answers
    with pytest.raises(RpcUnavailable, match="0 of 3 providers"):
        await rail.landed(signed)


async def test_a_provider_of_another_network_has_no_vote() -> None:
    """A Safe may have one address on Ethereum and on Base, and another nonce there."""
    nodes = [Node(), Node(chain_id=1, nonce=9), Node(chain_id=1, nonce=9)]
    assert not await rail_on(nodes[0], witnesses=nodes[1:]).is_fence_spent(UNSIGNED.fence)
    with pytest.raises(WrongChain):
        await rail_on(nodes[1]).is_fence_spent(UNSIGNED.fence)


async def test_bytes_go_to_every_provider() -> None:
    nodes = [Node(), Node(), Node()]
    rail = rail_on(nodes[0], witnesses=nodes[1:])
    signed = await rail.assemble(UNSIGNED, APPROVALS)
    nodes[0].refuses_to_send = True
    await rail.broadcast(signed)
    assert [len(node.sent) for node in nodes] == [0, 1, 1]


def test_a_batch_of_another_safe_is_not_ours(node: Node) -> None:
    rail_on(node).require_ours(UNSIGNED.context)
    with pytest.raises(WrongSafe, match="the batch is of Safe"):
        rail_on(node).require_ours(UNSIGNED.context | {"safe": "0x" + "22" * 20})


async def test_a_version_that_is_no_text_is_malformed(node: Node) -> None:
    node.version_bytes = b"\xff\xfe"
    with pytest.raises(Malformed):
        await rail_on(node).check_escrow()


@pytest.mark.parametrize("liar", [0, 1, 2])
async def test_a11_one_provider_cannot_invent_a_spent_fence_or_an_execution(liar: int) -> None:
    signed, nodes = await signed_bytes(), [Node(), Node(), Node()]
    nodes[liar].executes(as_now("ExecutionSuccess", "0x" + UNSIGNED.messages[LABEL].hex()), tx=signed.tx)
    rail = rail_on(nodes[0], witnesses=nodes[1:])
    assert not await rail.is_fence_spent(signed.fence)
    with pytest.raises(RpcUnavailable, match="1 of 3 providers saw the batch land"):
        await rail.landed(signed)


async def test_a_log_without_topics_is_no_execution(node: Node) -> None:
    signed = await signed_bytes()
    node.executes({"topics": [], "data": "0x" + UNSIGNED.messages[LABEL].hex()}, tx=signed.tx)
    assert await rail_on(node).landed(signed) is None


@pytest.mark.parametrize("version", ["1.4.0", "1.4.1", "1.4.1+L2", "1.5.0"])
async def test_a_safe_as_configured_is_paid_from(node: Node, version: str) -> None:
    node.version = version
    rail = rail_on(node)
    assert await rail.prepare(LINES) == UNSIGNED
    await rail.broadcast(await rail.assemble(UNSIGNED, APPROVALS))
    assert len(node.sent) == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": "1.3.0"}, "version 1.3.0, older than 1.4.0"),
        ({"version": "1.3.0+L2"}, "version 1.3.0\\+L2, older than 1.4.0"),
        ({"version": "1.1.1"}, "version 1.1.1"),
        ({"owners": OWNERS[:2]}, "its owners are"),
        ({"owners": (*OWNERS[:2], SAFE)}, f"its owners are .*{SAFE}.*, configured .*{OWNERS[2]}"),
        ({"threshold": 1}, "its threshold is 1, configured 2"),
        ({"owners": OWNERS[:1], "threshold": 1}, "its owners are .*; its threshold is 1, configured 2"),
    ],
)
async def test_a36_another_safe_than_configured_is_neither_planned_for_nor_sent_to(
    node: Node, change: dict[str, Any], said: str
) -> None:
    signed = await signed_bytes()
    for name, value in change.items():
        setattr(node, name, value)
    rail = rail_on(node)
    with pytest.raises(WrongSafe, match=said):
        await rail.prepare(LINES)
    with pytest.raises(WrongSafe, match=said):
        await rail.assemble(UNSIGNED, APPROVALS)
    with pytest.raises(WrongSafe, match=said):  # stored before a restart
        await rail.broadcast(signed)
    assert node.sent == []


async def test_a36_a_threshold_lowered_later_is_noticed_by_the_next_plan_and_signing(node: Node) -> None:
    rail = rail_on(node)
    await rail.prepare(LINES)
    node.threshold = 1
    with pytest.raises(WrongSafe):
        await rail.prepare(LINES)
    with pytest.raises(WrongSafe):
        await rail.assemble(UNSIGNED, APPROVALS)


async def test_a_node_that_is_down_delays_the_check_and_does_not_stand_for_it(node: Node) -> None:
    rail, signed = rail_on(node), await signed_bytes()
    node.is_down = True
    for _ in range(2):
        with pytest.raises(RpcUnavailable):
            await rail.broadcast(signed)
    node.is_down, node.threshold = False, 3
    with pytest.raises(WrongSafe):
        await rail.broadcast(signed)
    node.threshold = 2
    await rail.broadcast(signed)
    assert node.sent == ["0x" + signed.raw.hex()]


async def test_the_order_of_owners_in_the_settings_does_not_matter(node: Node) -> None:
    await rail_on(node, replace(TERMS, signers=(OWNERS[1], OWNERS[2], OWNERS[0]))).check_escrow()
