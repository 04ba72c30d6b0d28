"""A44: the token contract, the escrow, 0x0, an off-curve Solana account, another chain's address."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from solders.pubkey import Pubkey

from chain.addresses import parse_payout_address
from chain.errors import BadAddress
from chain.networks import BASE, ETHEREUM, SOLANA, Chain

ESCROW = "0xF7DE45F93B84b9eC7B92373bF381aD7366f22C08"
WALLET = "0x5aAeb6053F3E94C9b9A09f33669435E7Ef1BeAed"  # EIP-55's own example
SOLANA_WALLET = "vines1vzrYbzLMRdu58ou5XTby4qAqVRLmqo36NKPTg"
OFF_CURVE, _ = Pubkey.find_program_address([b"vault"], Pubkey.from_string(SOLANA_WALLET))


@pytest.mark.parametrize("chain", [Chain.ETHEREUM, Chain.BASE])
@pytest.mark.parametrize("text", [WALLET, WALLET.lower(), f" {WALLET}\n"])
def test_a_wallet_is_given_back_checksummed(chain: Chain, text: str) -> None:
    assert parse_payout_address(chain, text, {ESCROW}) == WALLET


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0x",
        "0x" + "0" * 40,
        "0x" + "0" * 39 + "1",
        "0x" + "0" * 36 + "dead",
        ESCROW,
        ESCROW.lower(),
        ETHEREUM.usdc,
        BASE.usdc.lower(),
        WALLET[:-1],
        WALLET + "0",
        WALLET[2:],
        WALLET.swapcase(),
        WALLET.upper().replace("0X", "0x"),
        WALLET[:-1] + "e",
        WALLET.replace("5aA", "5AA"),
        WALLET[:20] + " " + WALLET[20:],
        WALLET[:-1] + "\uff44",
        "vitalik.eth",
        SOLANA_WALLET,
        "0x" + "1" * 10_000,
    ],
)
def test_a44_an_unpayable_evm_address_is_refused(text: str) -> None:
    with pytest.raises(BadAddress):
        parse_payout_address(Chain.ETHEREUM, text, {ESCROW})


def test_a_solana_wallet_is_given_back() -> None:
    assert parse_payout_address(Chain.SOLANA, f" {SOLANA_WALLET} ") == SOLANA_WALLET


@pytest.mark.parametrize(
    "text",
    [
        "",
        WALLET,
        WALLET.lower(),
        SOLANA.usdc_mint,
        "11111111111111111111111111111111",
        "TokenkegQfeZyiNwAJbNbGKPFXCWuBvf9Ss623VQ5DA",
        str(OFF_CURVE),
        SOLANA_WALLET[:-1],
        SOLANA_WALLET + "1",
        SOLANA_WALLET.replace("v", "0", 1),
        SOLANA_WALLET.lower(),
        "1" * 10_000,
    ],
)
def test_a44_an_unpayable_solana_address_is_refused(text: str) -> None:
    with pytest.raises(BadAddress):
        parse_payout_address(Chain.SOLANA, text)


def test_a44_our_own_solana_wallets_are_refused() -> None:
    with pytest.raises(BadAddress, match="belongs to Tollway"):
        parse_payout_address(Chain.SOLANA, SOLANA_WALLET, {SOLANA_WALLET})


@given(st.sampled_from(list(Chain)), st.text(max_size=200))
def test_a44_no_text_does_worse_than_a_refusal(chain: Chain, text: str) -> None:
    try:
        address = parse_payout_address(chain, text)
    except BadAddress:
        return
    assert parse_payout_address(chain, address) == address
