"""What signers sign, against safe-eth-py's own hashes.

Vectors made with safe-eth-py 7.27.0 (`SafeTx.safe_tx_hash`, version 1.4.1, its own MultiSend encoding) in an
environment of its own: it drags in py-evm, which has no place among the project's packages.  Line i of a
vector pays 10,000,000 + i micro-USDC to the address whose 20 bytes are all (i mod 250) + 4.
"""

from __future__ import annotations

import pytest

from chain.addresses import parse_payout_address
from chain.evm.payouts import LABEL, SafeTerms
from chain.networks import BASE, ETHEREUM, Chain, EvmNetwork
from chain.ports import PayoutLine
from chain.units import Micro

OWNERS = ("0x" + "11" * 20, "0x" + "33" * 20, "0x" + "44" * 20)
TWOS = "0x2222222222222222222222222222222222222222"
SECOND = "0x0202020202020202020202020202020202020202"


@pytest.mark.parametrize(
    ("network", "safe", "nonce", "count", "expected"),
    [
        (ETHEREUM, TWOS, 0, 1, "5a450ddb40bdbec26ded1fcfc946c11a183dbdbea6eb8b4030e223029d334d06"),
        (BASE, TWOS, 7, 3, "abdaa0a9b49848660f0a534ca6e9bbf26d4136c490a005e3133c0f963c6cf143"),
        (BASE, SECOND, 41, 300, "3c2c7f46360ce16aa82ace1ea3595bbd2505674ba587276d9ba752f55cfb0455"),
    ],
)
def test_the_hash_to_sign_is_safe_eth_pys(
    network: EvmNetwork, safe: str, nonce: int, count: int, expected: str
) -> None:
    terms = SafeTerms(network, safe, OWNERS, 2)
    lines = [PayoutLine(f"p{i}", _address(i), Micro(10_000_000 + i)) for i in range(count)]
    unsigned = terms.rebuild(lines, str(nonce), terms.context())
    assert unsigned.messages[LABEL].hex() == expected


def _address(i: int) -> str:

    return parse_payout_address(Chain.ETHEREUM, "0x" + f"{i % 250 + 4:02x}" * 20)
