"""The batch digest is a format: its vectors are pinned, and every field matters."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest

from chain.networks import Chain
from chain.ports import PayoutLine
from chain.units import Micro
from marketplace.settlement.digest import batch_digest, encode_line, is_included, merkle_proof, merkle_root

LINES = tuple(PayoutLine(f"p{n}", f"0x{n:040d}", Micro(10_000_000 + n)) for n in range(5))


def digest(
    chain: Chain = Chain.BASE, escrow: str = "0xe5", fence: str = "7", lines: tuple[PayoutLine, ...] = LINES
) -> str:
    return batch_digest(chain=chain, escrow=escrow, fence=fence, lines=lines).hex()


def field(raw: bytes) -> bytes:
    return len(raw).to_bytes(4, "big") + raw


def test_the_encoding_written_out_by_hand() -> None:
    line = field(b"p0") + field(b"0x" + b"0" * 40) + field((10_000_000).to_bytes(8, "big"))
    assert encode_line(LINES[0]) == line
    whole = (
        field(b"tollway settlement batch 1")
        + field(b"base")
        + field(b"0xe5")
        + field(b"7")
        + field((1).to_bytes(8, "big"))
        + line
        + field((10_000_000).to_bytes(8, "big"))
    )
    assert digest(lines=LINES[:1]) == hashlib.sha256(whole).hexdigest()


def test_vectors() -> None:
    assert digest() == "b831bae77e6035ba3339893c285714d2018db8f35c8c2bcd18afb2adbaa600d1"
    assert merkle_root(LINES).hex() == "9a833ebc40ab56ca6e9c9f76afb7e10a0540ecd4decc3326e8d444bead8eae61"


def test_every_field_matters() -> None:
    changed = [
        digest(chain=Chain.ETHEREUM),
        digest(escrow="0xe6"),
        digest(fence="8"),
        digest(lines=LINES[:4]),
        digest(lines=LINES[::-1]),
        digest(lines=(*LINES[:4], replace(LINES[4], payout_id="p5"))),
        digest(lines=(*LINES[:4], replace(LINES[4], to=LINES[0].to))),
        digest(lines=(*LINES[:4], replace(LINES[4], amount=Micro(1)))),
    ]
    assert len({*changed, digest()}) == len(changed) + 1


def test_fields_cannot_flow_into_one_another() -> None:
    one, other = PayoutLine("ab", "c", Micro(1)), PayoutLine("a", "bc", Micro(1))
    assert encode_line(one) != encode_line(other)


@pytest.mark.parametrize("count", range(1, 6))
def test_the_root_is_rfc_6962s(count: int) -> None:
    def leaf(n: int) -> bytes:
        return hashlib.sha256(b"\0" + encode_line(LINES[n])).digest()

    def node(left: bytes, right: bytes) -> bytes:
        return hashlib.sha256(b"\1" + left + right).digest()

    by_hand = {
        1: lambda: leaf(0),
        2: lambda: node(leaf(0), leaf(1)),
        3: lambda: node(node(leaf(0), leaf(1)), leaf(2)),
        4: lambda: node(node(leaf(0), leaf(1)), node(leaf(2), leaf(3))),
        5: lambda: node(node(node(leaf(0), leaf(1)), node(leaf(2), leaf(3))), leaf(4)),
    }
    assert merkle_root(LINES[:count]) == by_hand[count]()


def test_an_empty_batch_has_no_root() -> None:
    with pytest.raises(ValueError, match="at least one"):
        merkle_root(())


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 8, 9, 13, 64, 100])
def test_every_payout_is_proved_included_and_nothing_else_is(count: int) -> None:
    lines = tuple(PayoutLine(f"p{n}", f"0x{n:040d}", Micro(10_000_000 + n)) for n in range(count))
    root = merkle_root(lines)
    for position, line in enumerate(lines):
        proof = merkle_proof(lines, position)
        good = {"position": position, "count": count, "proof": proof, "root": root}
        assert is_included(line, **good)
        wrong = [
            (replace(line, amount=Micro(line.amount.n + 1)), good),
            (replace(line, to="0x" + "9" * 40), good),
            (line, good | {"root": bytes(32)}),
            (line, good | {"position": position + 1}),
            (line, good | {"proof": (*proof, bytes(32))}),
            (line, good | {"proof": proof[:-1]} if proof else good | {"count": 2}),
        ]
        assert not any(is_included(other, **claim) for other, claim in wrong)
