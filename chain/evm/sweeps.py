"""Emptying deposit addresses into the escrow.

Anybody may trigger a sweep, by the factory or straight at a clone, so what was swept is read from the
token's own transfers (deposit address to Safe) and never from what we sent or from the factory's events.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

import msgspec

from chain.errors import ChainRefusal
from chain.evm import gas
from chain.evm.forwarders import Forwarders
from chain.evm.rpc import JsonRpc, quantity
from chain.ports import BlockFacts, Landed, SignedTransaction, Sweep, WatchSet
from chain.units import Micro

SALTS_MAX: Final = 200
"""A first sweep of a new address costs some 51,000 gas (measured): 10 million."""


class _RawReceipt(msgspec.Struct):
    blockNumber: str  # noqa: N815  the protocol's spelling
    blockHash: str  # noqa: N815  the protocol's spelling
    status: str


class Sweeper:
    """Builds, sends and follows sweeps of one factory."""

    def __init__(self, forwarders: Forwarders, rpc: JsonRpc, gas_payer: gas.GasPayer) -> None:
        self.forwarders = forwarders
        self._rpc = rpc
        self._gas_payer = gas_payer

    async def assemble(self, salts: Sequence[bytes]) -> SignedTransaction:
        """Dry-run and sign a sweep of up to SALTS_MAX addresses.  Sends nothing; the fence is empty.

        Nothing can be paid twice here: a second sweep finds the addresses empty.  It takes the place of an
        earlier one that is not mined yet, which a restarted settler has forgotten.
        """
        if not 0 < len(salts) <= SALTS_MAX:
            raise ChainRefusal(f"a sweep has 1..{SALTS_MAX} addresses, not {len(salts)}")
        calldata = self.forwarders.sweep_calldata(salts)
        outer = await self._gas_payer.wrap(self.forwarders.factory, calldata, after="latest")
        return SignedTransaction(outer.raw, outer.tx, fence="")

    async def gas_price_wei(self) -> int:
        """What a unit of gas costs now; FeesTooHigh above the gas payer's cap."""
        return await self._gas_payer.price_wei()

    async def replace(self, signed: SignedTransaction) -> SignedTransaction | None:
        """The same sweep on the same nonce for a better fee; None if that nonce is used by now.

        At most one of the two lands.  FeesTooHigh above the cap.
        """
        outer = await self._gas_payer.replace(signed.raw)
        return None if outer is None else SignedTransaction(outer.raw, outer.tx, fence="")

    async def broadcast(self, signed: SignedTransaction) -> None:
        """Send the same bytes; see `gas.broadcast` for what it raises."""
        await gas.broadcast(self._rpc, signed.raw, signed.tx)

    async def landed(self, signed: SignedTransaction) -> Landed | None:
        """The sweep's transaction at finality, or None."""
        receipt = await self._rpc.call("eth_getTransactionReceipt", signed.tx, shape=_RawReceipt | None)  # type: ignore[arg-type]  # a union is a shape too
        final = await self._rpc.call("eth_getBlockByNumber", "finalized", False, shape=dict[str, object])
        if receipt is None or quantity(receipt.blockNumber) > quantity(str(final.get("number"))):
            return None
        height = quantity(receipt.blockNumber)
        return Landed(signed.tx, height, receipt.blockHash, quantity(receipt.status) == 1)


def sweeps_in(blocks: Iterable[BlockFacts], escrow: str, deposit_addresses: WatchSet) -> list[Sweep]:
    """The sweeps in these blocks: transfers to the escrow from our deposit addresses, by transaction.

    The escrow must be in the watch set the blocks were read with.  Such a transfer is no deposit.
    """
    moved: dict[tuple[str, int], list[tuple[str, Micro]]] = {}
    for block in blocks:
        for seen in block.inbound:
            if (
                seen.to == escrow
                and seen.sender != escrow
                and deposit_addresses.is_watched(seen.sender.lower())
            ):
                moved.setdefault((seen.tx, seen.height), []).append((seen.sender, seen.amount))
    return [Sweep(tx, height, tuple(lines)) for (tx, height), lines in moved.items()]
