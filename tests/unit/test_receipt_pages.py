"""The law of receipts: trees, proofs, response hashes, signatures."""

from __future__ import annotations

import contextlib
import hashlib

import nkeys
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nacl.signing import SigningKey

from node_agent import protocol
from node_agent.protocol import ChoiceDelta, ProofInvalidError, ResponseDigest, ToolCallDelta


def _rfc6962(leaves: list[bytes]) -> bytes:
    """The tree as RFC 6962 defines it: split at the largest power of two below the count."""
    if len(leaves) == 1:
        return leaves[0]
    split = 1
    while split * 2 < len(leaves):
        split *= 2
    return protocol.merkle_parent(_rfc6962(leaves[:split]), _rfc6962(leaves[split:]))


@given(count=st.integers(1, 70), data=st.data())
def test_every_statement_of_a_page_is_proved_and_no_other(count: int, data: st.DataObject) -> None:
    leaves = [protocol.receipt_leaf(b"%d" % n) for n in range(count)]
    root = protocol.merkle_root(leaves)
    assert root == _rfc6962(leaves)
    position = data.draw(st.integers(0, count - 1))
    proof = protocol.merkle_proof(leaves, position)
    assert protocol.root_from_proof(leaves[position], position, count, proof) == root
    forged = protocol.receipt_leaf(b"another")
    assert protocol.root_from_proof(forged, position, count, proof) != root
    elsewhere = data.draw(st.integers(0, count - 1))
    if elsewhere != position:
        with contextlib.suppress(ProofInvalidError):
            assert protocol.root_from_proof(leaves[position], elsewhere, count, proof) != root
    with pytest.raises(ProofInvalidError):
        protocol.root_from_proof(leaves[position], position, count, [*proof, root])
    with pytest.raises(ProofInvalidError):
        protocol.root_from_proof(leaves[position], count, count, proof)


def test_a_statement_is_never_taken_for_an_inner_node() -> None:
    left, right = protocol.receipt_leaf(b"a"), protocol.receipt_leaf(b"b")
    assert protocol.receipt_leaf(left + right) != protocol.merkle_root([left, right])


def test_a_page_signature_covers_root_and_count() -> None:
    key = SigningKey.generate()
    root = protocol.merkle_root([protocol.receipt_leaf(b"a")])
    signature = key.sign(protocol.page_signing_bytes(1, root)).signature
    public = bytes(key.verify_key)
    protocol.verify_page_signature(public, 1, root, signature)
    for count, of, by in (
        (2, root, public),
        (1, bytes(32), public),
        (1, root, bytes(SigningKey.generate().verify_key)),
    ):
        with pytest.raises(ProofInvalidError):
            protocol.verify_page_signature(by, count, of, signature)


def test_a_countersignature_covers_what_is_disputed() -> None:
    pair = nkeys.from_seed(nkeys.encode_seed(bytes(range(32)), nkeys.PREFIX_BYTE_USER))
    public = pair.public_key.decode().rstrip("=")
    signature = pair.sign(protocol.countersigning_bytes(3, bytes(32), [1]))
    protocol.verify_countersignature(public, 3, bytes(32), [1], signature)
    for disputed in ([], [2], [1, 2]):
        with pytest.raises(ProofInvalidError):
            protocol.verify_countersignature(public, 3, bytes(32), disputed, signature)


@given(text=st.text(min_size=1, max_size=20), cut=st.integers(0, 20))
def test_a_response_hashes_alike_however_it_was_cut(text: str, cut: int) -> None:
    text = text.encode("utf-8", "ignore").decode()
    whole, pieces = ResponseDigest(), ResponseDigest()
    whole.add(ChoiceDelta(content=text))
    pieces.add(ChoiceDelta(content=text[:cut]))
    pieces.add(ChoiceDelta(content=text[cut:], finish_reason="stop"))
    assert whole.digest() == pieces.digest()


def test_the_response_hash_is_the_documented_one() -> None:
    digest = ResponseDigest()
    digest.add(ChoiceDelta(index=1, content="b"))
    digest.add(ChoiceDelta(index=0, reasoning="hm", content="a"))
    digest.add(ChoiceDelta(index=0, tool_calls=[ToolCallDelta(0, "call-1", "weather", '{"a"')]))
    digest.add(ChoiceDelta(index=0, tool_calls=[ToolCallDelta(0, None, None, ": 1}")]))

    def sha(text: str) -> bytes:
        return hashlib.sha256(text.encode()).digest()

    by_hand = hashlib.sha256(
        b"tollway response v1\n"
        + bytes([0, 0, 0, 0]) + sha("hm") + sha("a") + bytes([0, 0, 0, 1]) + sha("weather") + sha('{"a": 1}')
        + bytes([0, 0, 0, 1]) + sha("") + sha("b") + bytes(4)
    )  # fmt: skip
    assert digest.digest() == by_hand.digest()


def test_places_in_an_answer_do_not_run_together() -> None:
    """Reasoning is not content, one choice is not two, a call is not text."""
    answers = [
        [ChoiceDelta(content="ab")],
        [ChoiceDelta(reasoning="ab")],
        [ChoiceDelta(reasoning="a", content="b")],
        [ChoiceDelta(content="a"), ChoiceDelta(index=1, content="b")],
        [ChoiceDelta(tool_calls=[ToolCallDelta(0, None, "a", "b")])],
        [ChoiceDelta(tool_calls=[ToolCallDelta(0, None, "ab", "")])],
    ]
    digests = set()
    for deltas in answers:
        digest = ResponseDigest()
        for delta in deltas:
            digest.add(delta)
        digests.add(digest.digest())
    assert len(digests) == len(answers)
