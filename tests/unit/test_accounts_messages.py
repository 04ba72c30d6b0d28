"""The texts wallets sign."""

from __future__ import annotations

from datetime import UTC, datetime
from uuid import UUID

import pytest
from pydantic import SecretStr

from chain.networks import Chain
from marketplace.accounts.errors import BadChallenge
from marketplace.accounts.wallets import message_to_sign, nonce_in
from marketplace.platform.settings import Environment, Settings

SETTINGS = Settings(
    environment=Environment.DEVELOPMENT,
    secret=SecretStr("s" * 32),
    database_url=SecretStr("postgresql+asyncpg://"),
    public_url="https://tollway.example:8443",
)
AT = datetime(2026, 11, 22, 3, 4, 5, tzinfo=UTC)


def test_the_text_is_eip_4361s() -> None:
    address = "0xC02aaA39b223FE8D0A0e5C4F27eAD9083C756Cc2"
    assert message_to_sign(SETTINGS, Chain.BASE, address, nonce="abcdefgh1", now=AT, linking=None) == (
        "tollway.example:8443 wants you to sign in with your Ethereum account:\n"
        "0xC02aaA39b223FE8D0A0e5C4F27eAD9083C756Cc2\n"
        "\n"
        "Sign in to Tollway. This costs nothing and moves no money.\n"
        "\n"
        "URI: https://tollway.example:8443\n"
        "Version: 1\n"
        "Chain ID: 8453\n"
        "Nonce: abcdefgh1\n"
        "Issued At: 2026-11-22T03:04:05Z\n"
        "Expiration Time: 2026-11-22T03:09:05Z"
    )


def test_a_linking_text_names_the_account() -> None:
    person = UUID("0192f0c8-0000-7000-8000-000000000000")
    text = message_to_sign(SETTINGS, Chain.SOLANA, "address", nonce="abcdefgh1", now=AT, linking=person)
    assert f"Link this wallet to Tollway account {person}." in text
    assert "\nChain ID: mainnet\n" in text
    assert nonce_in(text) == "abcdefgh1"


@pytest.mark.parametrize(
    "text", ["", "Nonce: short", "Nonce: ab cdefghij", "x Nonce: abcdefgh1", "Nonce: é" * 9]
)
def test_a_text_without_a_nonce_proves_nothing(text: str) -> None:
    with pytest.raises(BadChallenge):
        nonce_in(text)
