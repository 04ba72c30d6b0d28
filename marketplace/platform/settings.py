"""Configuration: environment variables with the prefix TOLLWAY_, read once at start.

Everything a person must keep secret is a `SecretStr`.  Outside development an empty, short or default
secret refuses to start, and waiting times cannot be shortened.
"""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Final, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from marketplace.platform.errors import SetupFault

SECRET_CHARACTERS_MIN: Final = 32
DAY_S: Final = 86_400
STEP_UP_S_MAX: Final = 300


class Environment(StrEnum):
    """Where we run; only development may shorten waiting times."""

    DEVELOPMENT = "development"
    PRODUCTION = "production"


class ReferenceEngine(BaseModel):
    """An engine of the platform's own that reads answers again (`marketplace.reputation`)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str
    key: SecretStr = SecretStr("")
    model: str = ""
    """Its name there; empty = as in the catalogue."""


class Settings(BaseSettings):
    """One process's configuration."""

    model_config = SettingsConfigDict(env_prefix="TOLLWAY_", extra="ignore", frozen=True)

    environment: Environment = Environment.PRODUCTION
    data_dir: Path = Path("var")
    database_url: SecretStr = SecretStr("")
    database_replica_url: SecretStr = SecretStr("")
    """A streaming replica, from which gateways read usage, statistics and statements; empty = the book."""
    nats_url: str = "nats://127.0.0.1:4222"
    nats_password: SecretStr = SecretStr("")
    nats_issuer_seed: SecretStr = SecretStr("")
    """Account nkey seed that signs the answers to NATS' auth callout."""
    nats_ca_file: Path | None = None
    """Who signed the certificates of `tls://` servers (PEM); unset = whom the machine trusts."""
    public_nats_url: str = ""
    """Where operators' agents dial; empty = `nats_url`."""
    secret: SecretStr = SecretStr("")
    """Key of every HMAC over API keys and session tokens; never stored in the database."""
    receipt_seed: SecretStr = SecretStr("")
    """Ed25519 seed that signs receipts, 64 hex digits; empty = derived from `secret`."""
    chains_file: Path = Path("var/chains.json")
    """Deployed addresses and RPC endpoints (`marketplace.platform.chains`)."""
    api_host: str = "127.0.0.1"
    api_port: int = 8700
    public_url: str = ""
    trusted_proxies: Annotated[frozenset[str], NoDecode] = frozenset()
    """Peers whose X-Forwarded-For is believed (comma-separated addresses)."""

    decision_log: Path | None = None
    """Where routing decisions are kept for `tollway route replay`; they hold no content. None: nowhere."""
    decision_log_every: int = Field(default=1, ge=1)
    """Keep every so many-th."""

    deposit_micro_min: int = Field(default=5_000_000, ge=1)
    """R7: $5.00."""
    withdrawal_nano_min: int = Field(default=10_000_000_000, ge=1)
    """R15: $10.00."""
    overdraft_nano: int = Field(default=1_000_000_000, ge=0, le=50_000_000_000)
    """R12: what a buyer's last response may lack, $1.00; 0: it ends where the money does."""
    overdraft_nano_total: int = Field(default=50_000_000_000, ge=0, le=50_000_000_000)
    """What all buyers together may lack at any moment: $50.00."""
    reserve_s: int = Field(default=DAY_S, ge=0)
    """How long USDC-funded earnings mature."""
    card_reserve_s: int = Field(default=7 * DAY_S, ge=0)
    """The same of earnings from buyers who have paid by card."""
    cooling_s: int = Field(default=2 * DAY_S, ge=0)
    """How long a new payout address waits before its first use (A43)."""
    step_up_s: int = Field(default=300, ge=0)
    """How old somebody's proof of who he is may be when he changes where money goes (A43); 0: none asked."""

    metrics_port: int | None = Field(default=None, ge=0, le=65_535)
    """Where `tollway watch`, `settle` and `work` answer /metrics, /healthz and /readyz on `api_host`."""
    smtp_url: SecretStr = SecretStr("")
    """`smtp://user:password@host:587` or `smtps://…`; empty = development writes mails to data_dir/mail."""
    mail_from: str = "Tollway <tollway@localhost>"

    stripe_api_key: SecretStr = SecretStr("")
    """Switches identity checks by Stripe on."""
    stripe_webhook_secret: SecretStr = SecretStr("")
    stripe_api_base: str = ""
    """Empty: Stripe's own address; tests name another."""

    reference_engines: dict[str, ReferenceEngine] = {}
    """By model; JSON: `{"smollm2": {"url": "http://127.0.0.1:8000", "key": "…"}}`. None: no spot checks."""
    spot_check_permille: int = Field(default=10, ge=0, le=1000)
    """Share of answers that are read again at once by the reference engine."""
    canary_key: SecretStr = SecretStr("")
    """API key of an account of the platform's that buys canary requests like anybody; empty = none."""
    canary_every_s: int = Field(default=300, ge=1)

    plan_every_s: int | None = Field(default=None, ge=60)
    """How often the settler plans a batch of each chain by itself; None: when somebody asks."""

    settler_dir: Path = Path("var/settler")
    """Gas keys and the Solana address pool's seed: only the settler's machine has this folder."""

    @model_validator(mode="before")
    @classmethod
    def _split_proxies(cls, values: dict[str, object]) -> dict[str, object]:
        given = values.get("trusted_proxies")
        if isinstance(given, str):
            values["trusted_proxies"] = frozenset(filter(None, (part.strip() for part in given.split(","))))
        return values

    @field_validator("database_url", "database_replica_url", mode="after")
    @classmethod
    def _name_driver(cls, given: SecretStr) -> SecretStr:
        from marketplace.platform import database  # half of a command's start-up time, needed by some

        return SecretStr(database.with_driver(given.get_secret_value())) if given else given

    @model_validator(mode="after")
    def _refuse_unsafe(self) -> Self:
        if len(self.secret.get_secret_value()) < SECRET_CHARACTERS_MIN:
            raise ValueError(f"TOLLWAY_SECRET needs at least {SECRET_CHARACTERS_MIN} random characters")
        if self.stripe_api_key.get_secret_value() and not self.stripe_webhook_secret.get_secret_value():
            raise ValueError("TOLLWAY_STRIPE_WEBHOOK_SECRET is empty: anybody could send Stripe's events")
        if not self.database_url.get_secret_value():
            raise ValueError("TOLLWAY_DATABASE_URL is not set (`tollway up` starts a database and sets it)")
        if self.environment is Environment.PRODUCTION and (
            self.reserve_s < DAY_S or self.card_reserve_s < 7 * DAY_S or self.cooling_s < 2 * DAY_S
        ):
            raise ValueError(
                "reserve (24 h, by card 7 days) and cooling (48 h) times can be shortened in development only"
            )
        if self.environment is Environment.PRODUCTION and not 0 < self.step_up_s <= STEP_UP_S_MAX:
            raise ValueError("step-up (5 minutes) can be loosened in development only")
        return self

    @property
    def is_development(self) -> bool:
        return self.environment is Environment.DEVELOPMENT


def load_settings() -> Settings:
    """Read the environment; a bad value is a SetupFault whose message names the variable."""
    try:
        return Settings()
    except ValidationError as e:
        reasons = "; ".join(
            f"TOLLWAY_{'_'.join(map(str, error['loc'])).upper()}: {error['msg']}"
            if error["loc"]
            else error["msg"]
            for error in e.errors()
        )
        raise SetupFault(f"configuration: {reasons}") from e


class EvmChainConfig(BaseModel):
    """One EVM chain as deployed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rpc: tuple[str, ...]
    chain_id: int
    usdc: str
    escrow: str
    """The Safe."""
    forwarder_factory: str
    multi_send: str
    signers: tuple[str, ...]
    threshold: int


class SolanaChainConfig(BaseModel):
    """Solana as deployed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rpc: tuple[str, ...]
    usdc_mint: str
    multisig: str
    """The SPL multisig, which owns the escrow and is the delegate of every deposit account."""
    escrow: str
    """The multisig's token account."""
    nonce_account: str
    gas_payer: str
    signers: tuple[str, ...]
    threshold: int


class ChainsConfig(BaseModel):
    """Every chain this installation settles on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ethereum: EvmChainConfig
    base: EvmChainConfig
    solana: SolanaChainConfig


def load_chains(path: Path) -> ChainsConfig:
    """Read the chains file; SetupFault if it is missing or wrong."""
    try:
        return ChainsConfig.model_validate_json(path.read_bytes())
    except FileNotFoundError as e:
        raise SetupFault(f"{path} is missing: it names RPC endpoints and deployed addresses") from e
    except ValidationError as e:
        first = e.errors()[0]  # of a file of another kind there is one for every field
        place = ".".join(map(str, first["loc"]))
        reason = f"{place}: {first['msg']}" if place else first["msg"]
        raise SetupFault(f"{path} is not a chains file: {reason}") from e


def settings_environment(settings: dict[str, str]) -> dict[str, str]:
    """Give the environment of a child process: ours, plus `settings` as TOLLWAY_ variables."""
    return {**os.environ, **{f"TOLLWAY_{name.upper()}": value for name, value in settings.items()}}
