"""Paying operators on Solana: batches of USDC from the 2-of-3 escrow, each on a durable nonce.

The nonce's value is the fence: it is the transaction's blockhash, it changes when any transaction on
it lands (even a failing one), and only then are the old bytes dead.  A batch can therefore wait days
for its signers and still lands at most once.  Sweeps go the same way (`prepare_sweep`).
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import msgspec
from solders.hash import Hash
from solders.keypair import Keypair
from solders.message import MessageV0, from_bytes_versioned, to_bytes_versioned
from solders.pubkey import Pubkey
from solders.signature import Signature
from solders.transaction import VersionedTransaction

from chain import payout_quorum
from chain.errors import ChainError, Malformed, Reverted, RpcUnavailable, UnknownResult, WrongChain
from chain.networks import Chain
from chain.payout_quorum import Sight
from chain.ports import Approval, Landed, PayoutLine, SignedTransaction, Sweep, Unsigned
from chain.solana import escrow as consent
from chain.solana import programs, tables
from chain.solana.escrow import EscrowTerms
from chain.solana.rpc import AccountState, InContext, NodeError, SolanaRpc
from chain.solana.sending import explain, reason, send_and_confirm
from chain.solana.sweeps import lines_of
from chain.units import Micro

FINALIZED: Final = "finalized"
CONFIRMED: Final = "confirmed"
ACCOUNTS_PER_REQUEST: Final = 100
CREATES_PER_TRANSACTION: Final = 7
"""createAssociatedTokenAccount instructions that fit (measured)."""


class LineReverted(Reverted):
    """One line makes the batch fail; `payout_id` names it so that the planner can split it off."""

    def __init__(self, payout_id: str, why: str) -> None:
        super().__init__(f"payout {payout_id}: {why}")
        self.payout_id = payout_id


class _Simulated(msgspec.Struct):
    err: Any = None


class _Blockhash(msgspec.Struct):
    blockhash: str


class MultisigRail:
    """`chain.ports.PayoutRail` on Solana.

    Holds the settler's gas key, which pays fees and advances the nonce; it cannot move escrow money.
    """

    chain = Chain.SOLANA

    def __init__(
        self,
        rpc: SolanaRpc,
        terms: EscrowTerms,
        gas_key: Keypair,
        *,
        witnesses: Sequence[SolanaRpc] = (),
    ) -> None:
        """`witnesses`: further providers that must agree on what a lookup table holds and what has landed."""
        if str(gas_key.pubkey()) != terms.gas_payer:
            raise ValueError("the gas key is not the gas payer of the escrow's terms")
        self._rpc = rpc
        self._providers = (rpc, *witnesses)
        self._gas_key = gas_key
        self._abandoned: list[str] = []
        """Lookup tables made for a batch that was not frozen after all."""
        self._spent: str | None = None
        """The fence just seen spent: whoever then shows it unspent is behind, and knows nothing."""
        self._slot_floors = dict.fromkeys(self._providers, 0)
        """Finalized slot already seen of each: a lagging node must not show an older nonce as a newer one."""
        self.terms = terms
        self.escrow = terms.escrow
        self.signers = terms.signers
        self.threshold = terms.threshold
        self._plain_max = consent.lines_max(terms)
        """Lines that fit without a lookup table."""
        self.max_lines = consent.lines_max(terms, with_table=True)
        """Lines of one batch; ask before planning, `prepare` raises TooManyLines above it."""

    # ── preparing ─────────────────────────────────────────────────────────────────────────────────

    async def prepare(self, lines: Sequence[PayoutLine]) -> Unsigned:
        """Create missing token accounts, dry-run the batch and freeze what will be signed.

        More lines than fit plainly get a lookup table, made and final before this returns.
        Raises BadAddress, TooManyLines; LineReverted or Reverted with the chain's reason;
        WrongChain if the escrow on chain is not the one configured.
        """
        wallets = [consent.wallet(line.to) for line in lines]
        if not lines:
            raise Malformed("a batch without lines")
        if len(lines) > self.max_lines:
            raise consent.TooManyLines(len(lines), self.max_lines)
        await self.check_escrow()
        fence = await self._settled_fence()
        created = await self._create_accounts(lines, wallets)
        # In parts that need no table first: whoever cannot be paid is found before one is paid for.
        for start in range(0, len(lines), self._plain_max):
            part = lines[start : start + self._plain_max]
            unsigned = consent.build(self.terms, consent.PAYOUT, part, fence)
            await self._dry_run(unsigned)
        if len(lines) > self._plain_max:
            unsigned = await self._on_a_table(lines, fence)
        # For the treasury's books; `rebuild` carries it over unread.
        context = {**unsigned.context, "token_accounts_created": str(created)}
        return consent.rebuild(unsigned.lines, unsigned.fence, context)

    async def _on_a_table(self, lines: Sequence[PayoutLine], fence: str) -> Unsigned:
        """Freeze more lines than fit plainly, on a lookup table made for them."""
        contents = consent.table_contents(self.terms, lines)
        table = await tables.make(self._rpc, self._gas_key, contents)
        try:
            await tables.agreed_soon(self._providers, table, contents)
            terms = replace(self.terms, lookup_tables=((table, contents),))
            unsigned = consent.build(terms, consent.PAYOUT, lines, fence)
            await self._dry_run(unsigned)
        except ChainError:
            self._abandoned.append(table)
            raise
        return unsigned

    async def retire_tables(self, context: Mapping[str, str]) -> bool:
        """Get back the rent of an ended batch's lookup table, a step a call; True once nothing is left."""
        named = [table for table, _ in EscrowTerms.from_context(context).lookup_tables]
        for table in list(self._abandoned):
            if await tables.retire(self._rpc, self._gas_key, table):
                self._abandoned.remove(table)
        return all([await tables.retire(self._rpc, self._gas_key, table) for table in named])

    async def prepare_sweep(self, moves: Sequence[tuple[str, Micro]]) -> Unsigned:
        """Freeze a sweep of (deposit token account, amount) into the escrow, signed as a payout is."""
        await self.check_escrow()
        unsigned = consent.build(self.terms, consent.SWEEP, lines_of(moves), await self._settled_fence())
        await self._dry_run(unsigned)
        return unsigned

    def require_ours(self, context: Mapping[str, str]) -> None:
        """Raise WrongChain where a batch was frozen on another nonce account or for another escrow."""
        for name in ("nonce_account", "multisig", "escrow"):
            if context.get(name) != getattr(self.terms, name):
                ours = getattr(self.terms, name)
                raise WrongChain(f"the batch's {name} is {context.get(name)}, configured is {ours}")

    async def check_escrow(self) -> None:
        """Raise WrongChain unless multisig, escrow account and nonce on chain are the configured ones."""
        terms = self.terms
        keys = [terms.multisig, terms.escrow, terms.nonce_account]
        multisig, account, nonce = await self._rpc.accounts(keys, CONFIRMED)
        if multisig is None or account is None or nonce is None:
            raise WrongChain("the escrow's multisig, token account or nonce account does not exist there")
        threshold, signers = programs.multisig_account(multisig.owner, multisig.bytes())
        if threshold != terms.threshold or sorted(signers) != sorted(terms.signers):
            raise WrongChain(f"multisig {terms.multisig} has other signers than configured")
        token = programs.token_account(account.owner, account.bytes())
        if (token.mint, token.owner) != (terms.mint, terms.multisig):
            raise WrongChain(f"{terms.escrow} is not the USDC account of multisig {terms.multisig}")
        authority, _ = programs.nonce_account(nonce.owner, nonce.bytes())
        if authority != terms.gas_payer:
            raise WrongChain(f"nonce account {terms.nonce_account} obeys {authority}")

    async def _settled_fence(self) -> str:
        """The nonce's value, once an earlier batch's use of it is final.

        A fence must have been the finalized value: otherwise `is_fence_spent` would take the value
        before it for the one after it.
        """
        final = await self._fence(self._rpc, FINALIZED)
        differing = [self._is_past(rpc, final) for rpc in self._providers]
        if await payout_quorum.is_spent(differing):  # so it would look later, where most are not there yet
            raise RpcUnavailable("most providers show another value of the nonce: ask again in some seconds")
        newest = await self._fence(self._rpc, CONFIRMED)
        if final != newest:
            raise RpcUnavailable("the nonce was just used and is not final yet: ask again in some seconds")
        return final

    async def _fence(self, rpc: SolanaRpc, commitment: str) -> str:
        floor = self._slot_floors[rpc]
        options = {"encoding": "base64", "commitment": commitment, "minContextSlot": floor}
        answer = await rpc.call(
            "getAccountInfo", [self.terms.nonce_account, options], InContext[AccountState | None]
        )
        if commitment == FINALIZED:
            if answer.context.slot < floor:
                raise RpcUnavailable(f"the node went back from slot {floor} to {answer.context.slot}")
            self._slot_floors[rpc] = answer.context.slot
        if answer.value is None:
            raise WrongChain(f"nonce account {self.terms.nonce_account} does not exist")
        return programs.nonce_account(answer.value.owner, answer.value.bytes())[1]

    async def missing_accounts(self, lines: Sequence[PayoutLine]) -> frozenset[str]:
        """The wallets of `lines` that have no USDC account: `prepare` would pay the rent of one each."""
        mint, found = Pubkey.from_string(self.terms.mint), set[str]()
        for i in range(0, len(lines), ACCOUNTS_PER_REQUEST):
            page = lines[i : i + ACCOUNTS_PER_REQUEST]
            keys = [str(programs.associated_token_account(consent.wallet(line.to), mint)) for line in page]
            states = await self._rpc.accounts(keys, CONFIRMED)
            found |= {line.to for line, state in zip(page, states, strict=True) if state is None}
        return frozenset(found)

    async def _create_accounts(self, lines: Sequence[PayoutLine], wallets: Sequence[Pubkey]) -> int:
        """Create the token accounts recipients lack, at the gas payer's cost; gives how many."""
        mint = Pubkey.from_string(self.terms.mint)
        accounts = [str(programs.associated_token_account(w, mint)) for w in wallets]
        missing: list[Pubkey] = []
        for i in range(0, len(lines), ACCOUNTS_PER_REQUEST):
            page = slice(i, i + ACCOUNTS_PER_REQUEST)
            states = await self._rpc.accounts(accounts[page], CONFIRMED)
            owners = await self._rpc.accounts([str(w) for w in wallets[page]], CONFIRMED)
            for line, owner, key, state in zip(lines[page], wallets[page], owners, states, strict=True):
                if key is not None and key.owner == str(programs.TOKEN_PROGRAM):
                    raise LineReverted(line.payout_id, f"{line.to} is a token account; the wallet is needed")
                if state is None:
                    missing.append(owner)
                elif programs.token_account(state.owner, state.bytes()).is_frozen:
                    raise LineReverted(line.payout_id, f"the USDC account of {line.to} is frozen")
        unique = list(dict.fromkeys(missing))
        for i in range(0, len(unique), CREATES_PER_TRANSACTION):
            group = unique[i : i + CREATES_PER_TRANSACTION]
            make = [programs.create_associated_token_account(self._gas_key.pubkey(), w, mint) for w in group]
            await send_and_confirm(self._rpc, make, [self._gas_key])
        return len(unique)

    async def _dry_run(self, unsigned: Unsigned) -> None:
        message = _message(next(iter(unsigned.messages.values())))
        blank = [Signature.default()] * message.header.num_required_signatures
        raw = bytes(VersionedTransaction.populate(message, blank))
        options = {"encoding": "base64", "sigVerify": False, "commitment": CONFIRMED}
        answer = await self._rpc.call(
            "simulateTransaction", [base64.b64encode(raw).decode(), options], InContext[_Simulated]
        )
        error = answer.value.err
        if error is None:
            return
        why = explain(error)
        index = _failing_instruction(error)
        if index is not None and 1 <= index <= len(unsigned.lines):
            raise LineReverted(unsigned.lines[index - 1].payout_id, why)
        raise Reverted(why)

    # ── signing ───────────────────────────────────────────────────────────────────────────────────

    def rebuild(self, lines: Sequence[PayoutLine], fence: str, context: Mapping[str, str]) -> Unsigned:
        """Rebuild, without I/O, what must be signed: byte-identical to what was prepared."""
        return consent.rebuild(lines, fence, context)

    def verify(self, unsigned: Unsigned, approval: Approval) -> None:
        """Raise BadApproval unless `approval` signs exactly the messages that name its signer."""
        consent.verify(unsigned, approval)

    async def assemble(self, unsigned: Unsigned, approvals: Sequence[Approval]) -> SignedTransaction:
        """Put a complete combination and the gas payer's signature together.  Sends nothing.

        Raises BadApproval, NotEnoughApprovals; Malformed if the messages are not what their lines,
        fence and context say; what `tables.agreed` raises if a lookup table does not hold what they need.
        """
        again = consent.rebuild(unsigned.lines, unsigned.fence, unsigned.context)
        if again.messages != unsigned.messages:
            raise Malformed("the batch's messages are not what its lines say")
        for table, contents in EscrowTerms.from_context(unsigned.context).lookup_tables:
            await tables.agreed(self._providers, table, contents)
        raw, signatures = consent.complete(unsigned, approvals)
        message = _message(raw)
        by_key = {Pubkey.from_string(s): Signature(v) for s, v in signatures.items()}
        by_key[self._gas_key.pubkey()] = self._gas_key.sign_message(raw)
        needed = message.account_keys[: message.header.num_required_signatures]
        signed = VersionedTransaction.populate(message, [by_key[k] for k in needed])
        return SignedTransaction(bytes(signed), str(signed.signatures[0]), unsigned.fence)

    # ── sending ───────────────────────────────────────────────────────────────────────────────────

    async def broadcast(self, signed: SignedTransaction) -> None:
        """Send the same bytes; already known or already landed is success.

        UnknownResult in every other case, a refusal by the node included: the bytes stay good until
        their fence is spent (an escrow too empty today may be full tomorrow), so a refusal is no proof of
        anything.  Ask `landed` and `is_fence_spent`; `spend_fence` ends a batch for good.
        """
        await payout_quorum.sent([self._send(rpc, signed) for rpc in self._providers])

    async def _send(self, rpc: SolanaRpc, signed: SignedTransaction) -> None:
        try:
            await rpc.send(signed.raw)
        except (RpcUnavailable, Malformed) as e:
            if isinstance(e, NodeError) and await _is_known(rpc, signed.tx):
                return
            why = reason(e) if isinstance(e, NodeError) else str(e)
            raise UnknownResult(f"{signed.tx}: {why}") from e

    async def spend_fence(self, fence: str) -> None:
        """Make every batch on `fence` void, by advancing the nonce with the gas key alone.

        Returns once the attempt is confirmed or the fence is found spent; `is_fence_spent` proves it at
        finality (a batch may have landed first: ask `landed` too).
        """
        if await self._fence(self._rpc, CONFIRMED) != fence:
            return
        gas = self._gas_key.pubkey()
        advance = programs.advance_nonce(Pubkey.from_string(self.terms.nonce_account), gas)
        await send_and_confirm(self._rpc, [advance], [self._gas_key])

    async def landed(self, signed: SignedTransaction) -> Landed | None:
        """The transaction at `finalized` (perhaps failed), or None, as `payout_quorum.landed` says."""
        sights = [self._sight(rpc, signed) for rpc in self._providers]
        return await payout_quorum.landed(sights, is_spent=signed.fence == self._spent)

    async def is_fence_spent(self, fence: str) -> bool:
        """Tell whether the nonce's finalized value is no longer `fence` (`payout_quorum.is_spent`)."""
        Hash.from_string(fence)
        is_spent = await payout_quorum.is_spent([self._is_past(rpc, fence) for rpc in self._providers])
        self._spent = fence if is_spent else None
        return is_spent

    async def _sight(self, rpc: SolanaRpc, signed: SignedTransaction) -> Sight:
        is_past = await self._is_past(rpc, signed.fence)  # first: finality may move in between
        return Sight(is_past, await _landed(rpc, signed.tx))

    async def _is_past(self, rpc: SolanaRpc, fence: str) -> bool:
        return await self._fence(rpc, FINALIZED) != fence

    async def swept(self, unsigned: Unsigned, landed: Landed) -> Sweep:
        """Describe a sweep that landed successfully, in the ledger's terms."""
        if unsigned.context.get("kind") != consent.SWEEP or not landed.is_success:
            raise ValueError("not a sweep that succeeded")
        moved = tuple((line.to, line.amount) for line in unsigned.lines)
        return Sweep(landed.tx, landed.height, moved)


async def _is_known(rpc: SolanaRpc, tx: str) -> bool:
    try:
        return await rpc.status(tx) is not None
    except (RpcUnavailable, Malformed):
        return False


async def _landed(rpc: SolanaRpc, tx: str) -> Landed | None:
    status = await rpc.status(tx)
    if status is None or status.confirmation_status != FINALIZED:
        return None
    options = {
        "transactionDetails": "none",
        "rewards": False,
        "maxSupportedTransactionVersion": 0,
        "commitment": FINALIZED,
    }
    block = await rpc.call("getBlock", [status.slot, options], _Blockhash)
    return Landed(tx, status.slot, block.blockhash, is_success=status.err is None)


def _message(raw: bytes) -> MessageV0:
    message = from_bytes_versioned(raw)
    if not isinstance(message, MessageV0) or to_bytes_versioned(message) != raw:
        raise Malformed("not a version 0 message")
    return message


def _failing_instruction(error: Any) -> int | None:
    """Index of the failing instruction in a TransactionError's JSON form."""
    if isinstance(error, dict):
        detail = error.get("InstructionError")
        if isinstance(detail, list) and detail and type(detail[0]) is int:
            return detail[0]
    return None
