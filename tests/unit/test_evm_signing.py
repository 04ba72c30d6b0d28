"""Signatures, keystores and what a Safe's owners are asked to sign: no node needed."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from eth_hash.auto import keccak

from chain.errors import ChainRefusal
from chain.evm import keystore, safe
from chain.evm.addresses import from_bytes
from chain.evm.forwarders import Forwarders, create2_address, deposit_salt, factory_address
from chain.evm.payouts import LABEL, SafeTerms
from chain.evm.signatures import (
    CURVE_ORDER,
    BadSignatureGiven,
    personal_message_digest,
    recover_personal_sign,
)
from chain.networks import BASE, ETHEREUM, EvmNetwork
from chain.ports import Approval, PayoutLine, Unsigned
from chain.units import Micro

KEYS = [bytes([i]) * 32 for i in (1, 2, 3, 4)]
OWNERS = (
    "0x1a642f0E3c3aF545E7AcBD38b07251B3990914F1",
    "0x5050A4F4b3f9338C3472dcC01A87C76A144b3c9c",
    "0x3325a78425F17a7E487Eb5666b2bFd93aBb06c70",
)
SAFE = "0xF7DE45F93B84b9eC7B92373bF381aD7366f22C08"
LINES = [PayoutLine("p1", "0x" + "11" * 20, Micro(5)), PayoutLine("p2", "0x" + "22" * 20, Micro(7))]


def terms(network: EvmNetwork = BASE, *, at: str = SAFE) -> SafeTerms:
    return SafeTerms(network, at, OWNERS, 2)


def unsigned(fence: str = "3") -> Unsigned:
    return terms().rebuild(LINES, fence, terms().context())


def approval(key: int = 0, *, signature: bytes | None = None) -> Approval:
    signed = keystore.sign_digest(KEYS[key], unsigned().messages[LABEL])
    return Approval(OWNERS[key], {LABEL: signature or signed})


@pytest.mark.parametrize(
    ("creator", "expected"),
    [
        ("00" * 20, "0x4D1A2e2bB4F88F0250f26Ffff098B0b30B26BF38"),
        ("deadbeef" + "00" * 16, "0xB928f69Bb1D91Cd65274e3c79d8986362984fDA3"),
    ],
)
def test_create2_is_eip_1014s_own_examples(creator: str, expected: str) -> None:
    made = create2_address(bytes.fromhex(creator), bytes(32), keccak(b"\0"))
    assert from_bytes(made) == expected


def test_a_deposit_address_never_changes() -> None:
    """Pinned: a change here would move every buyer's deposit address."""
    forwarders = Forwarders(factory_address(SAFE))
    assert forwarders.factory == "0xBCf887057B74ef1c7DB0c63222E3fC200a36B8D2"
    assert forwarders.address_of(deposit_salt("buyer-1")) == "0x8c0beEA878D80CDd45685F929109205666BF6466"
    with pytest.raises(ValueError, match="32 bytes"):
        forwarders.address_of(b"short")


def test_a_wallets_signature_names_its_signer() -> None:
    message = "example.org wants you to sign in"
    signature = keystore.sign_digest(KEYS[0], personal_message_digest(message))
    assert recover_personal_sign(message, "0x" + signature.hex()) == OWNERS[0]
    assert recover_personal_sign(message + ".", "0x" + signature.hex()) != OWNERS[0]


def test_personal_sign_is_what_eth_account_signs() -> None:
    from eth_account import Account
    from eth_account.messages import encode_defunct

    for message in ("", "tollway", "ü" * 40):
        signed = Account.sign_message(encode_defunct(text=message), KEYS[1])
        assert recover_personal_sign(message, "0x" + signed.signature.hex()) == OWNERS[1]


@pytest.mark.parametrize(
    "signature",
    ["", "0x", "0x" + "00" * 65, "0x" + "11" * 64, "0x" + "11" * 64 + "1d", "zz" * 66, "0x" + "ff" * 65],
)
def test_what_is_no_signature_is_refused(signature: str) -> None:
    with pytest.raises(BadSignatureGiven):
        recover_personal_sign("text", signature)


def test_a36_a_digest_is_good_for_one_safe_on_one_chain_and_one_nonce() -> None:
    digests = {
        terms(network, at=at).rebuild(LINES, fence, terms(network, at=at).context()).messages[LABEL]
        for network in (BASE, ETHEREUM)
        for at in (SAFE, "0x" + "33" * 20)
        for fence in ("3", "4")
    }
    assert len(digests) == 8


def test_a38_a_malleable_or_foreign_signature_is_refused() -> None:
    good = approval().signatures[LABEL]
    terms().verify(unsigned(), approval())
    high_s = good[:32] + (CURVE_ORDER - int.from_bytes(good[32:64])).to_bytes(32) + bytes([55 - good[64]])
    for bad in (high_s, good[:64] + b"\x00", good[:64] + bytes([good[64] + 4]), good + b"\x1b", b""):
        with pytest.raises(ChainRefusal):
            terms().verify(unsigned(), Approval(OWNERS[0], {LABEL: bad}))
    with pytest.raises(ChainRefusal, match="not by"):
        terms().verify(unsigned(), Approval(OWNERS[1], {LABEL: good}))
    outsider = keystore.sign_digest(KEYS[3], unsigned().messages[LABEL])
    with pytest.raises(ChainRefusal, match="not an owner"):
        terms().verify(unsigned(), Approval("0x" + "44" * 20, {LABEL: outsider}))
    with pytest.raises(ChainRefusal):
        terms().verify(unsigned(), Approval(OWNERS[0], {"other": good}))


def test_a39_an_export_cannot_choose_what_is_signed() -> None:
    for field, value in (
        ("multi_send", "0x" + "66" * 20),
        ("usdc", ETHEREUM.usdc),
        ("safe", "0x" + "66" * 20),
        ("chain_id", "1"),
    ):
        with pytest.raises(ChainRefusal, match="but these signers' Safe is"):
            terms().rebuild(LINES, "3", terms().context() | {field: value})
    shown = unsigned()
    other = Unsigned(shown.chain, shown.fence, shown.lines, {LABEL: bytes(32)}, shown.context)
    forged = Approval(OWNERS[0], {LABEL: keystore.sign_digest(KEYS[0], bytes(32))})
    with pytest.raises(ChainRefusal, match="not the digest of the batch's lines"):
        terms().verify(other, forged)


def test_a40_only_a_batch_without_refunds_can_be_read_back() -> None:
    transaction = terms().transaction(LINES, "3")
    calldata = transaction.exec_calldata(b"")
    again = safe.from_calldata(calldata, chain_id=BASE.chain_id, safe=SAFE, nonce=3)
    assert again.digest() == transaction.digest()
    for word in (1, 3, 4, 5, 6, 7, 8):  # value, operation, three gas fields, token, receiver
        offset = 4 + 32 * word + 31
        changed = calldata[:offset] + bytes([calldata[offset] ^ 1]) + calldata[offset + 1 :]
        with pytest.raises(ChainRefusal):
            safe.from_calldata(changed, chain_id=BASE.chain_id, safe=SAFE, nonce=3)


@pytest.mark.parametrize(
    "lines",
    [
        [],
        [LINES[0], LINES[0]],
        [PayoutLine("p", LINES[0].to, Micro(0))],
        [PayoutLine("p", SAFE, Micro(1))],
        [PayoutLine("p", BASE.usdc, Micro(1))],
        [PayoutLine("p", OWNERS[0].lower(), Micro(1))],
        [PayoutLine(str(i), LINES[0].to, Micro(1)) for i in range(301)],
    ],
    ids=["none", "twice", "nothing", "escrow", "token", "spelling", "too many"],
)
def test_lines_nobody_should_sign_are_refused(lines: list[PayoutLine]) -> None:
    with pytest.raises(ChainRefusal):
        terms().transaction(lines, "0")


def test_a_fence_is_a_nonce() -> None:
    for fence in ("", "-1", "0x3", "3.0", "٣"):
        with pytest.raises(ChainRefusal):
            terms().transaction(LINES, fence)


def test_a_keystore_opens_with_its_password_only(tmp_path: Path) -> None:
    path = tmp_path / "signer" / "key.json"
    owner = keystore.create(path, "correct horse battery", key=KEYS[0], scrypt_n=2)
    assert owner == OWNERS[0] == keystore.address(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert KEYS[0].hex() not in path.read_text()
    digest = unsigned().messages[LABEL]
    signature = keystore.sign_safe_hash(path, "correct horse battery", digest)
    terms().verify(unsigned(), Approval(owner, {LABEL: signature}))
    with pytest.raises(keystore.KeystoreError, match="does not open"):
        keystore.unlock(path, "wrong horse battery")
    with pytest.raises(FileExistsError):
        keystore.create(path, "correct horse battery", scrypt_n=2)
    with pytest.raises(keystore.KeystoreError, match="at least"):
        keystore.create(tmp_path / "other.json", "short", scrypt_n=2)


@pytest.mark.parametrize("text", ["", "{}", "[1]", "not json"])
def test_what_is_no_keystore_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "key.json"
    path.write_text(text)
    with pytest.raises(keystore.KeystoreError):
        keystore.unlock(path, "correct horse battery")
