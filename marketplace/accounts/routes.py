"""Sign-up, sign-in, one's own account, API keys."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from typing import Annotated, Any, Final, Literal, Self
from uuid import UUID

from fastapi import APIRouter, Request
from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    StringConstraints,
    computed_field,
    model_validator,
)
from sqlalchemy.ext.asyncio import AsyncConnection

from chain.errors import BadAddress
from chain.networks import Chain
from marketplace.accounts import api_keys, decisions, errors, passwords, people, sessions, wallets
from marketplace.accounts.authenticate import AccountAuthenticator, bearer
from marketplace.accounts.sessions import close_session, open_session
from marketplace.accounts.tokens import session_digester
from marketplace.ledger.money import Nano, dollars
from marketplace.notices import outbox
from marketplace.platform.database import transaction
from marketplace.platform.http import (
    AccountIdentity,
    AdminIdentity,
    Identity,
    Refusal,
    RefusalOut,
    Services,
    ServicesDep,
    require_recent_proof,
)

router = APIRouter(prefix="/api", tags=["accounts"])

_ANSWERS: Final[dict[type[Exception], tuple[int, str]]] = {
    errors.EmailTaken: (409, "email_taken"),
    errors.WrongCredentials: (401, "wrong_credentials"),
    errors.BadChallenge: (401, "bad_challenge"),
    errors.WalletTaken: (409, "wallet_taken"),
    errors.PersonFrozen: (403, "account_frozen"),
    errors.PersonUnknown: (404, "person_unknown"),
    errors.ScopeNotHeld: (403, "scope_not_held"),
    errors.TooManyKeys: (409, "too_many_keys"),
    errors.HashingBusy: (503, "busy"),
    BadAddress: (400, "bad_address"),
}
_BUSY_S: Final = 2


@asynccontextmanager
async def _refusals() -> AsyncIterator[None]:
    """Turn what accounts refuse into the one HTTP answer it has."""
    try:
        yield
    except tuple(_ANSWERS) as e:
        status, code = _ANSWERS[type(e)]
        raise Refusal(status, code, str(e), retry_after_s=_BUSY_S if status == 503 else None) from e


@asynccontextmanager
async def _work(services: Services) -> AsyncIterator[AsyncConnection]:
    """One transaction, with refusals answered."""
    async with _refusals(), transaction(services.engine) as connection:
        yield connection


async def _tell_key_ring(services: Services) -> None:
    """Let this process know of a change of keys at once; the others poll, within a second."""
    if isinstance(services.authenticator, AccountAuthenticator):
        with contextlib.suppress(errors.KeysUnavailable):
            await services.authenticator.keys.refresh()


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("only printable characters on one line")
    return text


Email = Annotated[
    str,
    StringConstraints(
        strip_whitespace=True,
        to_lower=True,
        max_length=254,
        pattern=r"^[a-zA-Z0-9.!#$%&'*+/=?^_`{|}~-]{1,64}@[a-zA-Z0-9-]{1,63}(\.[a-zA-Z0-9-]{1,63})+$",
    ),
]
DisplayName = Annotated[
    str, StringConstraints(strip_whitespace=True, max_length=100), AfterValidator(_printable)
]
KeyName = Annotated[
    str, StringConstraints(strip_whitespace=True, min_length=1, max_length=64), AfterValidator(_printable)
]
Scope = Literal["inference", "account", "admin"]


class _Asked(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Registration(_Asked):
    email: Email
    password: SecretStr = Field(min_length=passwords.CHARACTERS_MIN, max_length=passwords.CHARACTERS_MAX)
    display_name: DisplayName = ""


class Login(_Asked):
    email: Annotated[str, StringConstraints(strip_whitespace=True, max_length=254)]
    password: SecretStr = Field(max_length=passwords.CHARACTERS_MAX)


class ChallengeRequest(_Asked):
    chain: Chain
    address: str = Field(max_length=128)


class WalletAnswer(_Asked):
    message: str = Field(max_length=wallets.MESSAGE_MAX)
    """The text of the challenge, unaltered."""
    signature: str = Field(max_length=wallets.SIGNATURE_MAX)
    """EVM: 0x and 130 hexadecimal digits (`personal_sign`); Solana: base58 of 64 bytes (`signMessage`)."""
    nonce: str | None = Field(default=None, max_length=64)
    """May be left out: the message names it."""


class Proof(_Asked):
    """A password, or a wallet's answer to a challenge of `/api/auth/wallet/challenge`."""

    password: SecretStr | None = Field(default=None, max_length=passwords.CHARACTERS_MAX)
    wallet: WalletAnswer | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.password is None) == (self.wallet is None):
            raise ValueError("give either a password or a wallet's answer")
        return self


ModelName = Annotated[str, StringConstraints(min_length=1, max_length=200)]


class LimitsRequest(_Asked):
    """Limits of a key, or of an account's keys together; null or absent: none of its own."""

    requests_per_minute: int | None = Field(default=None, ge=1, le=1_000_000)
    tokens_per_minute: int | None = Field(default=None, ge=1, le=10**12)
    parallel_requests: int | None = Field(default=None, ge=1, le=100_000)
    spend_nano_per_day: int | None = Field(
        default=None, ge=1, le=10**18, description="In any 24 hours, nano-dollars (1 dollar = 10^9)"
    )
    allowed_models: list[ModelName] | None = Field(default=None, min_length=1, max_length=100)


class KeyRequest(LimitsRequest):
    name: KeyName
    scopes: list[Scope] = Field(default=["inference"], min_length=1, max_length=3)
    expires_at: AwareDatetime | None = None


class KeyChange(LimitsRequest):
    """What is absent stays as it is; null takes a limit away."""

    name: KeyName | None = None
    expires_at: AwareDatetime | None = None


Reason = Annotated[
    str,
    StringConstraints(strip_whitespace=True, min_length=1, max_length=decisions.REASON_CHARACTERS_MAX),
    AfterValidator(_printable),
]


class AccountLimitsRequest(LimitsRequest):
    reason: Reason


class ReasonRequest(_Asked):
    reason: Reason


class AccountDecisionBody(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    action: Literal["limits", "freeze", "unfreeze"]
    actor: UUID
    reason: str
    detail: dict[str, Any]
    """The limits as they were set."""
    decided_at: datetime


class AccountDecisionsBody(BaseModel):
    data: list[AccountDecisionBody]


class ChallengeBody(BaseModel):
    nonce: str
    message: str
    expires_at: datetime


class SessionBody(BaseModel):
    token: str
    """Shown once; send it as `Authorization: Bearer st-…`."""
    person_id: UUID
    expires_at: datetime


class SteppedUp(BaseModel):
    proved_at: datetime
    until: datetime
    """Until when this session may change where money goes."""


class WalletBody(BaseModel):
    kind: Literal["evm", "solana"]
    address: str
    verified_at: datetime


class PersonBody(BaseModel):
    id: UUID
    email: str | None
    display_name: str
    is_operator: bool
    is_admin: bool
    created_at: datetime
    wallets: list[WalletBody]
    scopes: list[str]
    """What the credential of this request may do."""


class KeyBody(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    id: UUID
    name: str
    prefix: str
    scopes: list[str]
    created_at: datetime
    last_used_at: datetime | None
    revoked_at: datetime | None
    expires_at: datetime | None
    requests_per_minute: int | None
    tokens_per_minute: int | None
    parallel_requests: int | None
    spend_nano_per_day: int | None
    allowed_models: list[str] | None

    @computed_field  # type: ignore[prop-decorator]
    @property
    def spend_per_day(self) -> str | None:
        """The same in dollars, a decimal string."""
        return None if self.spend_nano_per_day is None else dollars(Nano(self.spend_nano_per_day))


class NewKeyBody(KeyBody):
    key: str
    """The key itself, shown this once."""


class KeyList(BaseModel):
    data: list[KeyBody]


def _refused(**also: str) -> dict[int | str, dict[str, Any]]:
    """Document a route's refusals: the common ones, and `also` (s409="why")."""
    reasons = {"default": "Refused, in OpenAI's error shape (400 malformed, 429 too many requests, 503)"}
    reasons |= {status.removeprefix("s"): why for status, why in also.items()}
    return {
        int(status) if status.isdigit() else status: {"model": RefusalOut, "description": why}
        for status, why in reasons.items()
    }


_NEEDS_ACCOUNT: Final = {"s401": "No credential that works", "s403": "The credential lacks `account`"}


async def _open(services: Services, connection: AsyncConnection, person_id: UUID) -> SessionBody:
    token, expires_at = await open_session(
        connection, services.settings.secret, person_id, services.clock.now()
    )
    return SessionBody(token=token, person_id=person_id, expires_at=expires_at)


@router.post("/auth/register", status_code=201, responses=_refused(s409="The e-mail address is taken"))
async def register(asked: Registration, services: ServicesDep) -> SessionBody:
    """Make an account with an e-mail address and a password, and sign in."""
    async with _refusals():
        password_hash = await passwords.hash_password(asked.password.get_secret_value())
    async with _work(services) as connection:
        person_id = await people.create_person(
            connection, email=asked.email, password_hash=password_hash, display_name=asked.display_name
        )
        return await _open(services, connection, person_id)


@router.post("/auth/login", responses=_refused(s401="Wrong e-mail or password", s403="Frozen"))
async def login(asked: Login, services: ServicesDep) -> SessionBody:
    """Sign in with an e-mail address and a password."""
    async with _work(services) as connection:
        found = await people.find_by_email(connection, asked.email)
    async with _refusals():
        person = await people.prove_password(found, asked.password.get_secret_value())
    async with _work(services) as connection:
        return await _open(services, connection, person.id)


@router.post(
    "/auth/step-up",
    responses=_refused(s401="Wrong password, or a signature that proves nothing", s400="An API key"),
)
async def step_up(
    proof: Proof, request: Request, services: ServicesDep, identity: AccountIdentity
) -> SteppedUp:
    """Prove again who you are, for what a stolen session must not do; good for five minutes."""
    if identity.key_id is not None:
        raise Refusal(400, "not_a_session", "an API key cannot step up; sign in")
    if proof.password is not None:
        async with _work(services) as connection:
            found = await people.find_with_password(connection, identity.person_id)
        async with _refusals():
            await people.prove_password(found, proof.password.get_secret_value())
    elif proof.wallet is not None:
        proved = await _prove(services, proof.wallet)
        async with _work(services) as connection:
            if proved.linking is not None or await wallets.owner_of(connection, proved) != identity.person_id:
                raise Refusal(401, "bad_challenge", "this wallet does not sign in to this account")
    token, now = bearer(request.headers.get("authorization")), services.clock.now()
    async with _work(services) as connection:
        await sessions.step_up(connection, session_digester(services.settings.secret)(token), now)
    return SteppedUp(proved_at=now, until=now + timedelta(seconds=services.settings.step_up_s))


@router.post("/auth/logout", status_code=204, responses=_refused(s401="No session", s400="An API key"))
async def logout(request: Request, services: ServicesDep, identity: AccountIdentity) -> None:
    """End the session this request is made with."""
    if identity.key_id is not None:
        raise Refusal(400, "not_a_session", "an API key has no session to end; revoke it instead")
    token = bearer(request.headers.get("authorization"))
    async with _work(services) as connection:
        await close_session(
            connection, session_digester(services.settings.secret)(token), services.clock.now()
        )


async def _challenge(services: Services, asked: ChallengeRequest, linking: UUID | None) -> ChallengeBody:
    async with _work(services) as connection:
        made = await wallets.challenge(
            connection,
            services.settings,
            asked.chain,
            asked.address,
            services.clock.now(),
            linking=linking,
        )
    return ChallengeBody(nonce=made.nonce, message=made.message, expires_at=made.expires_at)


async def _prove(services: Services, answer: WalletAnswer) -> wallets.ProvedWallet:
    async with _refusals():
        nonce = wallets.nonce_in(answer.message)
        if answer.nonce not in (None, nonce):
            raise errors.BadChallenge("the nonce is not the message's")
    async with _work(services) as connection:  # committed before the answer is judged: one try
        taken = await wallets.take_challenge(connection, nonce)
    async with _refusals():
        return wallets.check_answer(taken, answer.message, answer.signature, services.clock.now())


@router.post("/auth/wallet/challenge", responses=_refused(s400="Not a wallet's address on that chain"))
async def wallet_challenge(asked: ChallengeRequest, services: ServicesDep) -> ChallengeBody:
    """Get a text to sign (EIP-4361, or its Solana sibling); it works once, within five minutes."""
    return await _challenge(services, asked, None)


@router.post("/auth/wallet/verify", responses=_refused(s401="Proves nothing", s403="Frozen"))
async def wallet_verify(answer: WalletAnswer, services: ServicesDep) -> SessionBody:
    """Sign in with a wallet; the first time makes the account."""
    proved = await _prove(services, answer)
    if proved.linking is not None:
        raise Refusal(401, "bad_challenge", "this text links a wallet; it does not sign in")
    async with _work(services) as connection:
        person_id = await wallets.sign_in(connection, proved, services.clock.now())
        people.require_active(await people.find_person(connection, person_id))
        return await _open(services, connection, person_id)


async def _require_proof_if_any(services: Services, identity: Identity) -> None:
    """Who has a password or a wallet must have used it just now; whoever has neither makes his first one."""
    async with _work(services) as connection:
        has_wallet = await people.wallets_of(connection, identity.person_id)
        _, password_hash = await people.find_with_password(connection, identity.person_id)
    if has_wallet or password_hash is not None:
        require_recent_proof(services, identity)


@router.post("/me/wallets/challenge", responses=_refused(**_NEEDS_ACCOUNT))
async def link_challenge(
    asked: ChallengeRequest, services: ServicesDep, identity: AccountIdentity
) -> ChallengeBody:
    """Get a text that links one more wallet to this account."""
    return await _challenge(services, asked, identity.person_id)


@router.post("/me/wallets", responses=_refused(**_NEEDS_ACCOUNT, s409="The wallet signs in another account"))
async def link_wallet(answer: WalletAnswer, services: ServicesDep, identity: AccountIdentity) -> PersonBody:
    """Link one more wallet to this account.  A wallet signs in, so this needs a recent proof."""
    await _require_proof_if_any(services, identity)
    proved = await _prove(services, answer)
    if proved.linking != identity.person_id:
        raise Refusal(401, "bad_challenge", "this text does not link a wallet to this account")
    async with _work(services) as connection:
        await wallets.link(connection, proved, identity.person_id, services.clock.now())
        message = f"{proved.address} can now sign in to your account. If it was not you, tell us."
        await outbox.enqueue(
            connection, "wallet_linked", identity.person_id, {"message": message}, now=services.clock.now()
        )
    return await me(services, identity)


@router.get("/me", responses=_refused(**_NEEDS_ACCOUNT))
async def me(services: ServicesDep, identity: AccountIdentity) -> PersonBody:
    """Read one's own account."""
    async with _work(services) as connection:
        person = await people.find_person(connection, identity.person_id)
        linked = await people.wallets_of(connection, identity.person_id)
    return PersonBody(
        id=person.id,
        email=person.email,
        display_name=person.display_name,
        is_operator=person.is_operator,
        is_admin=person.is_admin,
        created_at=person.created_at,
        wallets=[WalletBody.model_validate(w, from_attributes=True) for w in linked],
        scopes=sorted(identity.scopes),
    )


@router.post("/me/operator", responses=_refused(**_NEEDS_ACCOUNT))
async def become_operator(services: ServicesDep, identity: AccountIdentity) -> PersonBody:
    """Become an operator, who may enrol nodes; repeating it changes nothing."""
    async with _work(services) as connection:
        await people.make_operator(connection, identity.person_id)
    return await me(services, identity)


@router.get("/keys", responses=_refused(**_NEEDS_ACCOUNT))
async def list_keys(services: ServicesDep, identity: AccountIdentity) -> KeyList:
    """List the newest 200 keys, live ones first."""
    async with _work(services) as connection:
        found = await api_keys.list_keys(connection, identity.person_id)
    return KeyList(data=[KeyBody.model_validate(key) for key in found])


@router.post("/keys", status_code=201, responses=_refused(**_NEEDS_ACCOUNT, s409="Too many live keys"))
async def make_key(asked: KeyRequest, services: ServicesDep, identity: AccountIdentity) -> NewKeyBody:
    """Make a key; the answer holds its only copy.  A key gets no scope its maker's credential lacks."""
    if not identity.scopes.issuperset(asked.scopes):
        raise Refusal(
            403, "scope_not_held", "a key cannot have a scope this credential lacks", param="scopes"
        )
    _check_expiry(asked.expires_at, services)
    async with _work(services) as connection:
        issued = await api_keys.issue_key(
            connection,
            services.settings.secret,
            identity.person_id,
            name=asked.name,
            scopes=asked.scopes,
            expires_at=asked.expires_at,
            limits=asked.model_dump(include=set(api_keys.LIMITS)),
        )
    await _tell_key_ring(services)
    made = KeyBody.model_validate(issued.key).model_dump(exclude={"spend_per_day"})
    return NewKeyBody(**made, key=issued.plaintext)


def _check_expiry(expires_at: datetime | None, services: Services) -> None:
    if expires_at is not None and expires_at <= services.clock.now():
        raise Refusal(400, "invalid_request", "expires_at: lies in the past", param="expires_at")


@router.patch("/keys/{key_id}", responses=_refused(**_NEEDS_ACCOUNT, s404="No such live key"))
async def change_key(
    key_id: UUID, asked: KeyChange, services: ServicesDep, identity: AccountIdentity
) -> KeyBody:
    """Change a live key's name, expiry or limits; in force here at once, everywhere within 5 s.

    A key does not change itself, else its limits would be none.
    """
    if identity.key_id == key_id:
        raise Refusal(403, "own_key", "a key cannot change itself; use a session or another key")
    _check_expiry(asked.expires_at, services)
    values = asked.model_dump(exclude_unset=True)
    if values.get("name", "") is None:
        raise Refusal(400, "invalid_request", "name: a key has one", param="name")
    async with _work(services) as connection:
        changed = await api_keys.change_key(connection, identity.person_id, key_id, values)
    if changed is None:
        raise Refusal(404, "key_not_found", "you have no such live key")
    await _tell_key_ring(services)
    return KeyBody.model_validate(changed)


_NEEDS_ADMIN: Final = {
    "s401": "No credential that works", "s403": "Not an administrator", "s404": "No such account",
}  # fmt: skip


@router.put("/admin/accounts/{person_id}/limits", status_code=204, responses=_refused(**_NEEDS_ADMIN))
async def limit_account(
    person_id: UUID, asked: AccountLimitsRequest, services: ServicesDep, identity: AdminIdentity
) -> None:
    """Set what all keys of an account may use together, in place of R22's defaults; null: the default."""
    limits = asked.model_dump(include=set(api_keys.LIMITS))
    async with _work(services) as connection:
        await decisions.limit(
            connection, person_id, limits,
            actor=identity.person_id, reason=asked.reason, now=services.clock.now(),
        )  # fmt: skip
    await _tell_key_ring(services)


@router.post("/admin/accounts/{person_id}/freeze", status_code=204, responses=_refused(**_NEEDS_ADMIN))
async def freeze_account(
    person_id: UUID, asked: ReasonRequest, services: ServicesDep, identity: AdminIdentity
) -> None:
    """Stop an account: its sessions at once, its keys everywhere within 5 s; its money stays its own."""
    await _set_frozen(services, person_id, identity, asked.reason, is_frozen=True)


@router.post("/admin/accounts/{person_id}/unfreeze", status_code=204, responses=_refused(**_NEEDS_ADMIN))
async def unfreeze_account(
    person_id: UUID, asked: ReasonRequest, services: ServicesDep, identity: AdminIdentity
) -> None:
    """Let a frozen account's keys and sessions work again."""
    await _set_frozen(services, person_id, identity, asked.reason, is_frozen=False)


async def _set_frozen(
    services: Services, person_id: UUID, identity: Identity, reason: str, *, is_frozen: bool
) -> None:
    async with _work(services) as connection:
        await decisions.set_frozen(
            connection, person_id,
            is_frozen=is_frozen, actor=identity.person_id, reason=reason, now=services.clock.now(),
        )  # fmt: skip
    await _tell_key_ring(services)


@router.get("/admin/accounts/{person_id}/decisions", responses=_refused(**_NEEDS_ADMIN))
async def account_decisions(
    person_id: UUID, services: ServicesDep, identity: AdminIdentity
) -> AccountDecisionsBody:
    """List what administrators decided about an account, newest first: who, why and what."""
    del identity
    async with _work(services) as connection:
        await people.find_person(connection, person_id)
        found = await decisions.decided(connection, person_id)
    return AccountDecisionsBody(data=[AccountDecisionBody.model_validate(one) for one in found])


@router.delete("/keys/{key_id}", status_code=204, responses=_refused(**_NEEDS_ACCOUNT, s404="No such key"))
async def revoke_key(key_id: UUID, services: ServicesDep, identity: AccountIdentity) -> None:
    """Revoke a key: refused by this process at once, everywhere within 5 s."""
    async with _work(services) as connection:
        is_mine = await api_keys.revoke_key(connection, identity.person_id, key_id)
    if not is_mine:
        raise Refusal(404, "key_not_found", "you have no such key")
    await _tell_key_ring(services)
