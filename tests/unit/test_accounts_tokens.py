"""Keys and tokens: their shape, their checksum, their digest, and where they may not appear."""

from __future__ import annotations

import hmac
import math
import zlib

import pytest
from pydantic import SecretStr

from marketplace.accounts.tokens import (
    ALPHABET,
    KEY_RANDOM,
    SESSION_RANDOM,
    has_credential,
    is_key,
    is_session_token,
    key_digester,
    make_key,
    make_nonce,
    make_session_token,
    session_digester,
)

SECRET = SecretStr("s" * 32)


def test_a_key_holds_220_random_bits_and_a_session_256() -> None:
    assert len(set(ALPHABET)) == 62
    assert KEY_RANDOM * math.log2(62) >= 220
    assert SESSION_RANDOM * math.log2(62) >= 256


def test_made_keys_are_keys_and_differ() -> None:
    keys = {make_key() for _ in range(1_000)}
    assert len(keys) == 1_000
    assert all(is_key(key) and len(key) == 54 and key.startswith("sk-tollway-") for key in keys)


def test_the_checksum_is_crc32_in_base62_least_digit_first() -> None:
    key = make_key()
    value = sum(ALPHABET.index(digit) * 62**place for place, digit in enumerate(key[-6:]))
    assert value == zlib.crc32(key[:-6].encode())


def test_every_single_mistyped_character_is_noticed() -> None:
    key = make_key()
    for place in range(len(key)):
        for wrong in ("0", "1"):
            mistyped = key[:place] + wrong + key[place + 1 :]
            assert is_key(mistyped) == (mistyped == key)


@pytest.mark.parametrize(
    "presented",
    [
        "",
        "sk-tollway-",
        "sk-" + "a" * 51,
        "\ud800" * 54,
        "é" * 54,
        "sk-tollway-" + "-" * 43,
        "x" * 10_000_000,
    ],
)
def test_other_text_is_no_key(presented: str) -> None:
    assert not is_key(presented)
    assert not is_session_token(presented)


def test_keys_and_sessions_are_told_apart() -> None:
    key, session = make_key(), make_session_token()
    assert (is_key(session), is_session_token(session)) == (False, True)
    assert (is_key(key), is_session_token(key)) == (True, False)


def test_the_digest_is_hmac_sha256_under_a_subkey() -> None:
    subkey = hmac.digest(b"s" * 32, b"tollway api key", "sha256")
    for text in ("", "sk-tollway-abc", make_key(), "x" * 500):
        assert key_digester(SECRET)(text) == hmac.digest(subkey, text.encode(), "sha256")


def test_one_secret_gives_keys_and_sessions_different_digests() -> None:
    assert key_digester(SECRET)("x") != session_digester(SECRET)("x")
    assert key_digester(SECRET)("x") != key_digester(SecretStr("t" * 32))("x")


def test_a_nonce_is_what_eip_4361_wants() -> None:
    nonce = make_nonce()
    assert len(nonce) >= 8
    assert nonce.isascii()
    assert nonce.isalnum()


@pytest.mark.parametrize(
    "query",
    [
        "",
        "limit=20&cursor=abc",
        "key=0192f0c8-0000-7000-8000-000000000000",
        "q=sk-&model=st-x",
        "a",
        "&&=",
        "%",
    ],
)
def test_an_ordinary_query_is_let_through(query: str) -> None:
    assert not has_credential(query)
