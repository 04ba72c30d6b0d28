"""From transfers on chain to rows and ledger entries, in the watcher's transaction.

Every final inbound transfer changes what we hold, so every one is booked at finality, in the same
transaction that moves the cursor past it: at every commit the books equal the chain at the cursor (S1).

    for somebody, minimum reached     deposit / deposit_direct         unswept or escrow → buyer
    for somebody, still below         deposit_unattributed             unswept or escrow → unattributed
      … and once the sum reaches it   attribution                      unattributed → buyer
    for nobody                        deposit_unattributed + case      unswept or escrow → unattributed
    for a frozen account              deposit_unattributed + case      unswept or escrow → unattributed
    sweep                             sweep                            escrow ← unswept
    left an account, not for escrow   correction + case                loss ← unswept
    minted to us                      as any deposit, + case
    a look-alike token                a row and a case                 nothing

The sum that must reach the minimum (R7) is over final, uncredited deposits of one person to one address on
one chain.  The ledger's key is "<chain>:<key>", the row's is (chain, key): a replay changes nothing.  What a
chain took back after it was final (`recovery`) and brought again is "<chain>:<key>#2", and so on, in the
ledger, in cases and in decisions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, NamedTuple
from uuid import UUID

import structlog
from sqlalchemy import ColumnElement, Row, and_, func, select, update
from sqlalchemy.dialects import postgresql
from sqlalchemy.ext.asyncio import AsyncConnection

from chain.deposits import Appeared, Confirmed, Deposit, Known, Reorged, advance
from chain.networks import Chain
from chain.ports import Departure, ForeignTransfer, TransferSeen
from chain.units import Micro
from marketplace.deposits.attribution import (
    Attribution,
    Directory,
    Swept,
    ToPerson,
    Unattributed,
    attribute,
    part_sweeps,
)
from marketplace.deposits.early import EarlyCredit, end_loans, lend
from marketplace.deposits.tables import deposits, support_cases, sweeps, taken_back, unsupported_deposits
from marketplace.ledger import accounts, templates
from marketplace.ledger.accounts import ensure_accounts
from marketplace.ledger.money import from_micro
from marketplace.ledger.posting import BULK_MAX, lock_balances, post_transfers
from marketplace.ledger.templates import Transfer
from marketplace.notices.outbox import enqueue_all
from marketplace.platform.database import is_among
from marketplace.platform.ids import uuid7

DETAIL_CHARACTERS_MAX: Final = 1000
CASE_MICRO_MIN: Final = 1_000_000
"""A dollar: for less nobody is asked, or dust at a few cents a thousand would bury what matters."""
TOLD_TRANSACTIONS_MAX: Final = 50
"""Named in one notice; its amount is of all."""
MINTER: Final = "0x" + "0" * 40
"""The sender of newly made USDC on EVM."""
_log: Final = structlog.get_logger("marketplace.deposits")


@dataclass(frozen=True, slots=True)
class Credit:
    """A deposit that became a buyer's balance."""

    person_id: UUID
    chain: Chain
    key: str
    amount: Micro


@dataclass(frozen=True, slots=True)
class Rules:
    """What decides about deposits on one chain."""

    chain: Chain
    escrow: str
    deposit_micro_min: int
    early: EarlyCredit | None = None
    """Caps of early credit; None lends nothing."""


@dataclass(frozen=True, slots=True)
class _Row:
    """A transfer with news, whose it is, and what is known of it now."""

    transfer: TransferSeen
    attribution: ToPerson | Unattributed
    status: Deposit
    ref: str | None
    """The ledger's key; goes with what is final."""


class _Case(NamedTuple):
    """What a person is asked to look at."""

    kind: str
    key: str
    detail: str


async def record_seen(
    conn: AsyncConnection,
    rules: Rules,
    transfers: Sequence[TransferSeen],
    directory: Directory,
    now: datetime,
    *,
    outbound: Sequence[Departure] = (),
) -> None:
    """Show people what is on its way; moves no money.  Sweeps and strangers' money wait for finality."""
    transfers = part_sweeps(transfers, outbound, rules.escrow).inbound
    known = await _known(conn, rules.chain, transfers)
    worth: list[tuple[TransferSeen, UUID]] = []
    fresh: list[_Row] = []
    for transfer in transfers:
        found = attribute(transfer, directory)
        if transfer.amount.n == 0 or not isinstance(found, ToPerson):
            continue
        after = advance(known.get(transfer.key), Appeared(transfer.block_hash, transfer.amount))
        if after != known.get(transfer.key):
            fresh.append(_Row(transfer, found, after.status, None))
            # A smaller one may wait for long.
            if transfer.amount.n >= rules.deposit_micro_min and not found.is_held:
                worth.append((transfer, found.person_id))
    await _write(conn, fresh, now)
    if rules.early is not None:
        await post_entries(conn, await lend(conn, rules.early, worth, now))


async def orphan(conn: AsyncConnection, chain: Chain, block_hashes: Collection[str], now: datetime) -> int:
    """Mark what was seen in blocks that left the chain; gives how many."""
    if not block_hashes:
        return 0
    statement = (
        select(deposits.c.key, deposits.c.status, deposits.c.block_hash, deposits.c.amount_micro)
        .where(
            deposits.c.chain == chain.value,
            is_among(deposits.c.block_hash, set(block_hashes)),
            deposits.c.status != Deposit.ORPHANED.value,
        )
        .with_for_update()
    )
    rows = (await conn.execute(statement)).all()
    await _orphan_rows(conn, chain, rows, now)
    return len(rows)


async def book_final(
    conn: AsyncConnection,
    rules: Rules,
    transfers: Sequence[TransferSeen],
    directory: Directory,
    *,
    through_height: int,
    now: datetime,
    outbound: Sequence[Departure] = (),
) -> list[Credit]:
    """Take in every transfer of the final blocks up to `through_height`; gives what was credited.

    Raises FinalityViolated if one contradicts an earlier final record.  Never commits.
    """
    parted = part_sweeps(transfers, outbound, rules.escrow)
    transfers = parted.inbound
    await _orphan_unconfirmed(conn, rules.chain, transfers, through_height, now)
    known = await _known(conn, rules.chain, transfers)
    keys = [*(transfer.key for transfer in transfers), *(departure.key for departure in parted.swept)]
    refs = await ledger_refs(conn, rules.chain, keys)
    entries: list[Transfer] = []
    for departure in parted.swept:
        entries += await _book_sweep(conn, rules.chain, departure, refs[departure.key], now)
    for departure in parted.strayed:
        entries += await _book_stray(conn, rules.chain, departure, now)
    arrivals: list[_Row] = []
    for transfer in transfers:
        if transfer.amount.n == 0:
            continue
        found: Attribution = attribute(transfer, directory)
        if isinstance(found, Swept):
            swept = _as_departure(transfer)
            entries += await _book_sweep(conn, rules.chain, swept, refs[swept.key], now)
            continue
        before = known.get(transfer.key)
        advance(before, Confirmed(transfer.block_hash, transfer.amount))
        if before is None or before.status is not Deposit.FINAL:
            arrivals.append(_Row(transfer, found, Deposit.FINAL, refs[transfer.key]))
    await _write(conn, arrivals, now)
    credited, credit_entries = await _credit(conn, rules, arrivals, now)
    repaid = await end_loans(
        conn, rules.chain, {credit.key for credit in credited}, is_called_in=False, now=now
    )
    await post_entries(conn, [*entries, *credit_entries, *(entry for _, entry in repaid)])
    await tell_credited(conn, credited, now)
    set_aside = {arrival.transfer.key for arrival in arrivals} - {credit.key for credit in credited}
    await _call_in(conn, rules.chain, set_aside, now)
    return credited


async def _call_in(conn: AsyncConnection, chain: Chain, keys: Collection[str], now: datetime) -> None:
    """End loans whose deposit did not come, spent or not, and tell a person."""
    ended = await end_loans(conn, chain, keys, is_called_in=True, now=now)
    await post_entries(conn, [entry for _, entry in ended])
    for key, entry in ended:
        detail = f"{entry.amount} lent against a deposit that was not credited, taken back from {entry.debit}"
        await open_case(conn, chain, kind="early_credit_called_in", key=key, detail=detail, now=now)


async def open_case(
    conn: AsyncConnection, chain: Chain, *, kind: str, key: str, detail: str, now: datetime
) -> None:
    """Ask a person to look at something; once per kind and key."""
    await _open_cases(conn, chain, [_Case(kind, key, detail)], now)


async def _open_cases(conn: AsyncConnection, chain: Chain, cases: Sequence[_Case], now: datetime) -> None:
    if not cases:
        return
    rows = [
        {
            "id": uuid7(),
            "kind": case.kind,
            "chain": chain.value,
            "key": case.key,
            "detail": case.detail[:DETAIL_CHARACTERS_MAX],
            "created_at": now,
        }
        for case in cases
    ]
    await conn.execute(postgresql.insert(support_cases).on_conflict_do_nothing(), rows)


async def book_opening_balance(
    conn: AsyncConnection, chain: Chain, amount: Micro, height: int, now: datetime
) -> None:
    """Book what the escrow held before the first watched block: it is nobody's until a person decides."""
    if amount.n == 0:
        return
    key = f"opening:{height}"
    entry = templates.deposit_unattributed(
        chain=chain.value, amount=from_micro(amount.n), ref=f"{chain.value}:{key}"
    )
    await post_entries(conn, [entry])
    detail = f"the escrow held {amount} USDC at {height}"
    await open_case(conn, chain, kind="opening_balance", key=key, detail=detail, now=now)


async def ledger_refs(conn: AsyncConnection, chain: Chain, keys: Collection[str]) -> dict[str, str]:
    """The ledger's key of each movement; one that its chain took back before has another each time."""
    statement = (
        select(taken_back.c.key, func.count().label("times"))
        .where(taken_back.c.chain == chain.value, is_among(taken_back.c.key, set(keys)))
        .group_by(taken_back.c.key)
    )
    times = {row.key: row.times for row in await conn.execute(statement)} if keys else {}
    return {key: f"{chain.value}:{key}" + (f"#{times[key] + 1}" if key in times else "") for key in keys}


def decision_key(chain: Chain, ref: str) -> str:
    """What people call the movement with this ledger key."""
    return ref.removeprefix(f"{chain.value}:")


async def orphan_seen_above(conn: AsyncConnection, chain: Chain, height: int, now: datetime) -> None:
    """Mark everything that was seen above `height` and is not final; what is there will be seen again."""
    statement = (
        select(deposits.c.key, deposits.c.status, deposits.c.block_hash, deposits.c.amount_micro)
        .where(
            deposits.c.chain == chain.value,
            deposits.c.status == Deposit.SEEN.value,
            deposits.c.height > height,
        )
        .with_for_update()
    )
    await _orphan_rows(conn, chain, (await conn.execute(statement)).all(), now)


async def _known(conn: AsyncConnection, chain: Chain, transfers: Sequence[TransferSeen]) -> dict[str, Known]:
    statement = (
        select(deposits.c.key, deposits.c.status, deposits.c.block_hash, deposits.c.amount_micro)
        .where(deposits.c.chain == chain.value, is_among(deposits.c.key, [t.key for t in transfers]))
        .with_for_update()
    )
    return {row.key: as_known(row) for row in await conn.execute(statement)}


def as_known(row: Row[*tuple[Any, ...]]) -> Known:
    """What a row of `deposits` says."""
    return Known(Deposit(row.status), row.block_hash, Micro(row.amount_micro))


async def _orphan_unconfirmed(
    conn: AsyncConnection, chain: Chain, transfers: Sequence[TransferSeen], through_height: int, now: datetime
) -> None:
    """What was seen at or below a final height and is not in the final blocks never happened."""
    statement = (
        select(deposits.c.key, deposits.c.status, deposits.c.block_hash, deposits.c.amount_micro)
        .where(
            deposits.c.chain == chain.value,
            deposits.c.status == Deposit.SEEN.value,
            deposits.c.height <= through_height,
        )
        .with_for_update()
    )
    there = {transfer.key for transfer in transfers}
    gone = [row for row in await conn.execute(statement) if row.key not in there]
    await _orphan_rows(conn, chain, gone, now)


async def _orphan_rows(
    conn: AsyncConnection, chain: Chain, rows: Sequence[Row[*tuple[Any, ...]]], now: datetime
) -> None:
    for row in rows:
        advance(as_known(row), Reorged())
    if rows:
        await _call_in(conn, chain, [row.key for row in rows], now)
        await conn.execute(
            update(deposits)
            .where(deposits.c.chain == chain.value, is_among(deposits.c.key, [row.key for row in rows]))
            .values(status=Deposit.ORPHANED.value)
        )


async def _write(conn: AsyncConnection, rows: Sequence[_Row], now: datetime) -> None:
    """Write these rows over what was known of the same movements, and ask people about the odd ones."""
    if not rows:
        return
    insertion = postgresql.insert(deposits)
    told = {name: insertion.excluded[name] for name in _TOLD}
    await conn.execute(
        insertion.on_conflict_do_update(constraint="one_row_per_movement", set_=told),
        [_columns(row, now) for row in rows],
    )
    await _open_cases(conn, rows[0].transfer.chain, [case for row in rows for case in _odd_about(row)], now)


_TOLD: Final = (
    "height",
    "block_hash",
    "amount_micro",
    "person_id",
    "intent",
    "is_direct",
    "status",
    "final_at",
    "transfer_ref",
    "is_held",
)
"""What later news of a movement may change."""


def _columns(row: _Row, now: datetime) -> dict[str, object]:
    transfer, is_final = row.transfer, row.status is Deposit.FINAL
    person = row.attribution if isinstance(row.attribution, ToPerson) else None
    return {
        "id": uuid7(),
        "chain": transfer.chain.value,
        "key": transfer.key,
        "tx": transfer.tx,
        "to_address": transfer.to,
        "sender": transfer.sender,
        "seen_at": now,
        "height": transfer.height,
        "block_hash": transfer.block_hash,
        "amount_micro": transfer.amount.n,
        "person_id": person.person_id if person else None,
        "intent": person.intent if person else None,
        "is_direct": row.attribution.is_direct,
        "status": row.status.value,
        "final_at": now if is_final else None,
        "transfer_ref": row.ref,
        "is_held": is_final and person is not None and person.is_held,
    }


def _odd_about(row: _Row) -> Iterator[_Case]:
    """What a person should look at; the rest is on record, and may be decided about all the same."""
    transfer, found, is_final = row.transfer, row.attribution, row.status is Deposit.FINAL
    detail = f"{transfer.amount} USDC from {transfer.sender} to {transfer.to} in {transfer.tx}"
    key = transfer.key if row.ref is None else decision_key(transfer.chain, row.ref)
    if transfer.amount.n >= CASE_MICRO_MIN:
        if isinstance(found, Unattributed):
            yield _Case(found.reason, key, detail)
        elif is_final and found.is_held:
            yield _Case("frozen_account", key, detail)
    if is_final and transfer.sender == MINTER:
        yield _Case("minted", key, detail)


def _as_departure(transfer: TransferSeen) -> Departure:
    """An EVM sweep, seen from the address that was emptied."""
    return Departure(
        transfer.tx,
        transfer.key,
        transfer.height,
        transfer.block_hash,
        transfer.sender,
        transfer.amount,
    )


async def _book_sweep(
    conn: AsyncConnection, chain: Chain, departure: Departure, ref: str, now: datetime
) -> list[Transfer]:
    statement = (
        postgresql.insert(sweeps)
        .values(
            chain=chain.value,
            key=departure.key,
            tx=departure.tx,
            height=departure.height,
            block_hash=departure.block_hash,
            from_address=departure.account,
            amount_micro=departure.amount.n,
            booked_at=now,
        )
        .on_conflict_do_nothing()
        .returning(sweeps.c.key)
    )
    if await conn.scalar(statement) is None:
        return []
    amount = from_micro(departure.amount.n)
    return [templates.sweep(chain=chain.value, amount=amount, ref=ref)]


async def _book_stray(
    conn: AsyncConnection, chain: Chain, departure: Departure, now: datetime
) -> list[Transfer]:
    """Money left a pool account for elsewhere: ours to carry, and a person's to look at, at once."""
    detail = f"{departure.amount} USDC left {departure.account} in {departure.tx}, not for the escrow"
    _log.critical("pool money left", chain=chain.value, account=departure.account, tx=departure.tx)
    await open_case(conn, chain, kind="pool_money_left", key=departure.key, detail=detail, now=now)
    return [
        templates.correction(
            debit=accounts.LOSS,
            credit=accounts.unswept(chain.value),
            amount=from_micro(departure.amount.n),
            ref=f"{chain.value}:stray:{departure.key}",
            note=detail,
        )
    ]


async def record_foreign(
    conn: AsyncConnection,
    chain: Chain,
    found: Sequence[ForeignTransfer],
    directory: Directory,
    now: datetime,
) -> None:
    """Keep tokens we do not take on record, with a case; no balance changes, whatever they are called."""
    rows: list[dict[str, object]] = []
    cases: list[_Case] = []
    for foreign in found:
        transfer = foreign.transfer
        owner = directory.owners.get(transfer.to)
        rows.append(
            {
                "chain": chain.value,
                "key": transfer.key,
                "tx": transfer.tx,
                "height": transfer.height,
                "block_hash": transfer.block_hash,
                "token": foreign.token,
                "name": foreign.name,
                "to_address": transfer.to,
                "sender": transfer.sender,
                "amount": transfer.amount.n,
                "person_id": owner.person_id if owner else None,
                "at": now,
            }
        )
        detail = (
            f"{transfer.amount.n} units of {foreign.name} ({foreign.token}) from {transfer.sender} "
            f"to {transfer.to} in {transfer.tx}"
        )
        cases.append(_Case("unsupported_token", transfer.key, detail))
    if rows:
        await conn.execute(postgresql.insert(unsupported_deposits).on_conflict_do_nothing(), rows)
    await _open_cases(conn, chain, cases, now)


async def _credit(
    conn: AsyncConnection, rules: Rules, arrivals: Sequence[_Row], now: datetime
) -> tuple[list[Credit], list[Transfer]]:
    groups: dict[tuple[str, UUID], list[_Row]] = defaultdict(list)
    entries: list[Transfer] = []
    credited: list[Credit] = []
    for arrival in arrivals:
        match arrival.attribution:
            case ToPerson(person_id, is_held=False):
                groups[arrival.transfer.to, person_id].append(arrival)
            case _:
                entries.append(_set_aside(arrival))
    if not groups:
        return credited, entries
    new_keys = {arrival.transfer.key for new in groups.values() for arrival in new}
    reaching = await _reaching(conn, rules, groups)
    earlier_by_group = await _waiting(conn, rules.chain, reaching, without=new_keys)
    for group, new in groups.items():
        if group not in reaching:
            entries += [_set_aside(arrival) for arrival in new]
            continue
        person_id, arrived = group[1], {arrival.transfer.key: arrival for arrival in new}
        earlier = earlier_by_group[group]
        amounts = {key: arrival.transfer.amount.n for key, arrival in arrived.items()}
        waited = {key: amount for key, (amount, _) in earlier.items()}
        released = reach_minimum(waited, amounts, rules.deposit_micro_min)
        refs = {key: ref for key, (_, ref) in earlier.items()} | {k: _ref(a) for k, a in arrived.items()}
        entries += [_set_aside(arrival) for key, arrival in arrived.items() if key not in released]
        entries += [_give(rules.chain, person_id, refs[k], n, arrived.get(k)) for k, n in released.items()]
        credited += [Credit(person_id, rules.chain, key, Micro(n)) for key, n in released.items()]
    if credited:
        await conn.execute(
            update(deposits)
            .where(
                deposits.c.chain == rules.chain.value,
                is_among(deposits.c.key, [credit.key for credit in credited]),
            )
            .values(credited_at=now)
        )
    return credited, entries


def reach_minimum(earlier: Mapping[str, int], arrived: Mapping[str, int], minimum: int) -> dict[str, int]:
    """Say what is credited (R7): whenever the sum that waits reaches the minimum, all of it.

    Taken one by one in the chain's order, so that it does not matter how many blocks were read at once.

    >>> reach_minimum({"a": 2}, {"b": 2, "c": 1, "d": 4}, 5)
    {'a': 2, 'b': 2, 'c': 1}
    """
    released: dict[str, int] = {}
    waiting, total = dict(earlier), sum(earlier.values())
    for key, amount in arrived.items():
        waiting[key] = amount
        total += amount
        if total >= minimum:
            released |= waiting
            waiting, total = {}, 0
    return released


def _waits(chain: Chain, groups: Collection[tuple[str, UUID]]) -> ColumnElement[bool]:
    """Final and uncredited, at one of these addresses and of one of these people."""
    columns = deposits.c
    return and_(
        columns.chain == chain.value,
        is_among(columns.to_address, {address for address, _ in groups}),
        is_among(columns.person_id, {person_id for _, person_id in groups}),
        columns.status == Deposit.FINAL.value,
        columns.credited_at.is_(None),
        ~columns.is_held,
    )


async def _reaching(
    conn: AsyncConnection, rules: Rules, groups: Collection[tuple[str, UUID]]
) -> set[tuple[str, UUID]]:
    """Those (address, person) whose waiting sum, today's arrivals included, is enough to be credited.

    Of the others nothing else is read: a hundred thousand deposits of a millionth wait at no cost but a sum.
    """
    columns = deposits.c
    statement = (
        select(columns.to_address, columns.person_id)
        .where(_waits(rules.chain, groups))
        .group_by(columns.to_address, columns.person_id)
        .having(func.sum(columns.amount_micro) >= rules.deposit_micro_min)
    )
    found = {(row.to_address, row.person_id) for row in await conn.execute(statement)}
    return found & set(groups)


async def _waiting(
    conn: AsyncConnection,
    chain: Chain,
    groups: Collection[tuple[str, UUID]],
    *,
    without: Collection[str],
) -> dict[tuple[str, UUID], dict[str, tuple[int, str]]]:
    """By (address, person): final, uncredited amounts and ledger keys by key, from earlier ranges."""
    if not groups:
        return {}
    columns = deposits.c
    statement = (
        select(columns.key, columns.amount_micro, columns.transfer_ref, columns.to_address, columns.person_id)
        .where(_waits(chain, groups))
        .order_by(columns.height, columns.id)
        .with_for_update()
    )
    found: dict[tuple[str, UUID], dict[str, tuple[int, str]]] = {group: {} for group in groups}
    for row in await conn.execute(statement):
        if row.key not in without and (row.to_address, row.person_id) in found:
            found[row.to_address, row.person_id][row.key] = (row.amount_micro, row.transfer_ref)
    return found


def _ref(arrival: _Row) -> str:
    assert arrival.ref is not None
    return arrival.ref


def _set_aside(arrival: _Row) -> Transfer:
    transfer = arrival.transfer
    return templates.deposit_unattributed(
        chain=transfer.chain.value,
        amount=from_micro(transfer.amount.n),
        ref=_ref(arrival),
        in_escrow=arrival.attribution.is_direct,
    )


def _give(chain: Chain, person_id: UUID, ref: str, amount_micro: int, arrival: _Row | None) -> Transfer:
    """A new deposit goes straight to the buyer; an earlier one was set aside and is attributed now."""
    if arrival is None:
        build = templates.attribution
    else:
        build = templates.deposit_direct if arrival.attribution.is_direct else templates.deposit
    return build(chain=chain.value, person=str(person_id), amount=from_micro(amount_micro), ref=ref)


async def tell_credited(conn: AsyncConnection, credited: Sequence[Credit], now: datetime) -> None:
    """Leave each person one notice of what was credited to him, in the same transaction."""
    by_person: dict[tuple[UUID, Chain], list[Credit]] = defaultdict(list)
    for credit in credited:
        by_person[credit.person_id, credit.chain].append(credit)
    told: list[tuple[UUID, Mapping[str, object]]] = []
    for (person_id, chain), of_person in by_person.items():
        amount = Micro(sum(credit.amount.n for credit in of_person))
        payload: dict[str, object] = {
            "chain": chain.value,
            "amount": str(amount),
            "amount_micro": amount.n,
            "count": len(of_person),
            "transactions": sorted({transaction_of(c.key) for c in of_person[:TOLD_TRANSACTIONS_MAX]}),
        }
        told.append((person_id, payload))
    await enqueue_all(conn, "deposit_credited", told, now=now)


def transaction_of(key: str) -> str:
    """The transaction hash or signature that a movement's key begins with."""
    return key.partition(":")[0]


async def post_entries(conn: AsyncConnection, entries: Sequence[Transfer]) -> None:
    """Post all, their balances locked first in the ledger's order, so that nobody waits in a circle."""
    if len(entries) > BULK_MAX:  # else the ledger does it
        names = {account for entry in entries for account in (entry.debit, entry.credit)}
        await lock_balances(conn, (await ensure_accounts(conn, names)).values())
    for start in range(0, len(entries), BULK_MAX):
        await post_transfers(conn, entries[start : start + BULK_MAX])
