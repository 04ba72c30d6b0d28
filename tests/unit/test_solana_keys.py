"""Pool keys, Solana Pay links, sign-in signatures, keystores, base58."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st
from solders.keypair import Keypair
from solders.pubkey import Pubkey

from chain.solana import base58, deposits, keystore, pay, signatures
from chain.units import Micro

SEED = bytes(range(64))
PASSWORD = "correct horse battery"


@pytest.mark.parametrize("index", [0, 1, 77, 2**31 - 1])
def test_pool_keys_are_the_ones_wallets_derive(index: int) -> None:
    """solders' own SLIP-0010 is the oracle; a wallet restored from the seed finds the same keys."""
    expected = Keypair.from_seed_and_derivation_path(SEED, f"m/44'/501'/{index}'/0'")
    assert deposits.derive_owner(SEED, index) == expected


def test_pool_keys_refuse_short_seeds_and_foreign_indices() -> None:
    for seed, index in ((b"short", 0), (bytes(65), 0), (SEED, -1), (SEED, 2**31)):
        with pytest.raises(ValueError, match="pool"):
            deposits.derive_owner(seed, index)


def test_a_solana_pay_link_names_wallet_amount_mint_and_reference() -> None:
    reference = pay.new_reference()
    wallet = str(Keypair().pubkey())
    url = pay.solana_pay_url(wallet, reference=reference, label="Tollway & Söhne", amount=Micro(12_500_000))
    parts = urlsplit(url)
    assert (parts.scheme, parts.path) == ("solana", wallet)
    assert "+" not in parts.query
    assert parse_qs(parts.query) == {
        "amount": ["12.5"],
        "spl-token": ["EPjFWdd5AufqSSqeM2qN1xzybapC8G4wEGGkZwyTDt1v"],
        "reference": [reference],
        "label": ["Tollway & Söhne"],
    }
    assert "amount" not in pay.solana_pay_url(wallet, reference=reference, label="x")


@given(st.integers(1, 10**15))
def test_a_link_s_amount_is_exact(micro: int) -> None:
    url = pay.solana_pay_url("w", reference="r", label="l", amount=Micro(micro))
    text = parse_qs(urlsplit(url).query)["amount"][0]
    whole, _, part = text.partition(".")
    assert int(whole) * 10**6 + int(part.ljust(6, "0") or "0") == micro


def test_references_are_fresh_public_keys() -> None:
    made = {pay.new_reference() for _ in range(100)}
    assert len(made) == 100
    assert all(len(bytes(Pubkey.from_string(r))) == 32 for r in made)


def test_a_sign_in_signature_is_checked() -> None:
    wallet, message = Keypair(), b"tollway.example wants you to sign in"
    address, signature = str(wallet.pubkey()), bytes(wallet.sign_message(message))
    assert signatures.is_signed_by(address, message, signature)
    assert not signatures.is_signed_by(address, message + b"!", signature)
    assert not signatures.is_signed_by(str(Keypair().pubkey()), message, signature)
    assert not signatures.is_signed_by(address, message, signature[:-1])
    assert not signatures.is_signed_by("nonsense", message, signature)
    assert not signatures.is_signed_by("1" * 32, message, bytes(64))
    long = bytes(signatures.MESSAGE_BYTES_MAX + 1)
    assert not signatures.is_signed_by(address, long, bytes(wallet.sign_message(long)))


def test_a_keystore_gives_its_key_back_to_its_password_only(tmp_path: Path) -> None:
    path = tmp_path / "signer.json"
    address = keystore.create(path, PASSWORD, scrypt_n=1024)
    assert keystore.address_of(path) == address
    key = keystore.load(path, PASSWORD)
    assert str(key.pubkey()) == address
    assert signatures.is_signed_by(address, b"batch", keystore.sign(key, b"batch"))
    with pytest.raises(keystore.WrongPassword):
        keystore.load(path, PASSWORD + "!")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(FileExistsError):
        keystore.create(path, PASSWORD, scrypt_n=1024)
    with pytest.raises(ValueError, match="characters"):
        keystore.create(tmp_path / "other.json", "short", scrypt_n=1024)


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("address", str(Keypair.from_seed(bytes(32)).pubkey()), keystore.WrongPassword),
        ("sealed", "00" * 48, keystore.WrongPassword),
        ("sealed", "zz", keystore.BadKeystore),
        ("scrypt_n", 2**40, keystore.BadKeystore),
        ("scrypt_n", 1000, keystore.BadKeystore),
        ("version", "other", keystore.BadKeystore),
        ("address", 5, keystore.BadKeystore),
    ],
)
def test_a_changed_keystore_is_refused(
    tmp_path: Path, field: str, value: object, error: type[Exception]
) -> None:
    path = tmp_path / "signer.json"
    keystore.create(path, PASSWORD, scrypt_n=1024)
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(error):
        keystore.load(path, PASSWORD)


@given(st.binary(max_size=200))
def test_base58_round_trips(data: bytes) -> None:
    assert base58.decode(base58.encode(data)) == data


@given(st.binary(min_size=32, max_size=32))
def test_base58_agrees_with_solders(data: bytes) -> None:
    assert base58.encode(data) == str(Pubkey(data))


def test_base58_refuses_foreign_and_endless_text() -> None:
    for text in ("0", "O", "I", "l", "é", "1" * 5000):
        with pytest.raises(ValueError, match="base58"):
            base58.decode(text)
