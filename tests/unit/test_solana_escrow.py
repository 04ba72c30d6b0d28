"""What signers sign on Solana: pure, byte-exact, per combination."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from solders.hash import Hash
from solders.keypair import Keypair
from solders.message import MessageV0, from_bytes_versioned
from solders.pubkey import Pubkey

from chain.errors import BadAddress, Malformed
from chain.ports import Approval, PayoutLine
from chain.solana import escrow, programs
from chain.units import Micro

SIGNERS = [Keypair.from_seed(bytes([i]) * 32) for i in (1, 2, 3)]
GAS = Keypair.from_seed(bytes([9]) * 32)
MINT = "EPjFWdd5AufqSSqeM2qN1xzybapC8G4wEGGkZwyTDt1v"
MULTISIG = str(Keypair.from_seed(bytes([7]) * 32).pubkey())
FENCE = str(Hash(bytes([5]) * 32))
TERMS = escrow.EscrowTerms(
    mint=MINT,
    multisig=MULTISIG,
    signers=tuple(str(s.pubkey()) for s in SIGNERS),
    threshold=2,
    escrow=str(programs.associated_token_account(Pubkey.from_string(MULTISIG), Pubkey.from_string(MINT))),
    gas_payer=str(GAS.pubkey()),
    nonce_account=str(Keypair.from_seed(bytes([8]) * 32).pubkey()),
)


def a_line(seed: int, amount: int) -> PayoutLine:
    return PayoutLine(f"p{seed}", str(Keypair.from_seed(seed.to_bytes(32)).pubkey()), Micro(amount))


LINES = [a_line(1, 10_000_000), a_line(2, 25_500_000)]


def test_there_is_one_message_per_combination_and_each_names_its_signers() -> None:
    unsigned = escrow.build(TERMS, escrow.PAYOUT, LINES, FENCE)
    assert len(unsigned.messages) == 3
    for label, raw in unsigned.messages.items():
        message = from_bytes_versioned(raw)
        assert isinstance(message, MessageV0)
        required = {str(k) for k in message.account_keys[: message.header.num_required_signatures]}
        assert required == {TERMS.gas_payer, *label.split("+")}
        assert label.split("+") == sorted(label.split("+"))
        assert str(message.recent_blockhash) == FENCE
        assert bytes(message.instructions[0].data) == b"\4\0\0\0", "the nonce must be advanced first"


def test_an_export_survives_json_and_rebuilds_to_the_same_bytes() -> None:
    unsigned = escrow.build(TERMS, escrow.PAYOUT, LINES, FENCE)
    context = json.loads(json.dumps(unsigned.context))
    assert escrow.rebuild(LINES, FENCE, context) == unsigned
    assert escrow.EscrowTerms.from_context(context) == TERMS


@given(st.integers(0, 1), st.sampled_from(["to", "amount", "fence", "escrow", "multisig", "nonce_account"]))
def test_every_change_changes_every_message(index: int, what: str) -> None:
    unsigned = escrow.build(TERMS, escrow.PAYOUT, LINES, FENCE)
    lines, fence, context = list(LINES), FENCE, dict(unsigned.context)
    if what == "to":
        lines[index] = replace(lines[index], to=str(Keypair().pubkey()))
    elif what == "amount":
        lines[index] = replace(lines[index], amount=lines[index].amount + Micro(1))
    elif what == "fence":
        fence = str(Hash.new_unique())
    else:
        context[what] = str(Keypair().pubkey())
    other = escrow.rebuild(lines, fence, context)
    assert all(other.messages[label] != raw for label, raw in unsigned.messages.items())


def test_a_true_approval_verifies_and_false_ones_do_not() -> None:
    unsigned = escrow.build(TERMS, escrow.PAYOUT, LINES, FENCE)
    good = escrow.approve(unsigned, SIGNERS[0])
    escrow.verify(unsigned, good)
    assert len(good.signatures) == 2
    label = next(iter(good.signatures))
    flipped = bytes([good.signatures[label][0] ^ 1]) + good.signatures[label][1:]
    stranger = Keypair()
    for bad in (
        replace(good, signatures={**good.signatures, label: flipped}),
        replace(good, signatures={**good.signatures, label: b""}),
        replace(good, signatures={label: good.signatures[label]}),
        replace(good, signer=str(SIGNERS[1].pubkey())),
        Approval(
            str(stranger.pubkey()), {k: bytes(stranger.sign_message(m)) for k, m in unsigned.messages.items()}
        ),
        Approval("no key", good.signatures),
    ):
        with pytest.raises(escrow.BadApproval):
            escrow.verify(unsigned, bad)
    with pytest.raises(escrow.BadApproval):
        escrow.approve(unsigned, stranger)


def test_an_approval_of_another_batch_is_refused() -> None:
    unsigned = escrow.build(TERMS, escrow.PAYOUT, LINES, FENCE)
    other = escrow.build(TERMS, escrow.PAYOUT, LINES, str(Hash.new_unique()))
    with pytest.raises(escrow.BadApproval):
        escrow.verify(unsigned, escrow.approve(other, SIGNERS[0]))


def test_a_program_s_address_is_no_recipient() -> None:
    off_curve = str(programs.associated_token_account(GAS.pubkey(), Pubkey.from_string(MINT)))
    for to in (off_curve, "0xA0b86991c6218b36c1d19D4a2e9Eb0cE3606eB48", "", "1" * 100):
        with pytest.raises(BadAddress):
            escrow.build(TERMS, escrow.PAYOUT, [PayoutLine("p", to, Micro(1))], FENCE)


def test_as_many_lines_fit_as_promised_and_not_one_more() -> None:
    most = escrow.lines_max(TERMS)
    lines = [a_line(100 + i, 1) for i in range(most)]
    escrow.build(TERMS, escrow.PAYOUT, lines, FENCE)
    with pytest.raises(escrow.TooManyLines, match=str(most)):
        escrow.build(TERMS, escrow.PAYOUT, [*lines, a_line(99, 1)], FENCE)


def on_a_table(lines: list[PayoutLine]) -> escrow.EscrowTerms:
    table = str(Keypair.from_seed(bytes([6]) * 32).pubkey())
    return replace(TERMS, lookup_tables=((table, escrow.table_contents(TERMS, lines)),))


def test_a_lookup_table_makes_room_for_35_and_more() -> None:
    most = escrow.lines_max(TERMS, with_table=True)
    assert most >= 35
    lines = [a_line(100 + i, 1) for i in range(most)]
    unsigned = escrow.build(on_a_table(lines), escrow.PAYOUT, lines, FENCE)
    assert escrow.rebuild(lines, FENCE, json.loads(json.dumps(unsigned.context))) == unsigned
    over = [*lines, a_line(99, 1)]
    with pytest.raises(escrow.TooManyLines, match=str(most)):
        escrow.build(on_a_table(over), escrow.PAYOUT, over, FENCE)


def test_a_lookup_table_of_another_content_than_the_lines_need_is_refused() -> None:
    lines = [a_line(100 + i, 1) for i in range(20)]
    ((table, right),) = on_a_table(lines).lookup_tables
    thief = str(Keypair.from_seed(bytes([66]) * 32).pubkey())
    for content in (
        (*right[:5], thief, *right[6:]),  # a payee's account replaced
        (right[0], right[1], right[2], right[4], right[3], *right[5:]),  # two exchanged
        (*right, thief),
        right[:-1],
    ):
        with pytest.raises(Malformed, match="lookup table"):
            escrow.build(replace(TERMS, lookup_tables=((table, content),)), escrow.PAYOUT, lines, FENCE)
    for kind, tables in ((escrow.PAYOUT, ((table, right),) * 2), (escrow.SWEEP, ((table, right),))):
        with pytest.raises(Malformed, match="lookup table"):
            escrow.build(replace(TERMS, lookup_tables=tables), kind, lines, FENCE)


@pytest.mark.parametrize(
    "damage", [{"threshold": "x"}, {"signers": ""}, {"lookup_tables": "[1]"}, {"kind": "loan"}]
)
def test_a_damaged_context_is_refused(damage: dict[str, str]) -> None:
    unsigned = escrow.build(TERMS, escrow.PAYOUT, LINES, FENCE)
    with pytest.raises(Malformed):
        escrow.rebuild(LINES, FENCE, {**unsigned.context, **damage})


def test_a_batch_without_lines_is_refused() -> None:
    with pytest.raises(Malformed):
        escrow.build(TERMS, escrow.PAYOUT, [], FENCE)
