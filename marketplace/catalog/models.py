"""Models and their tokenizers.

A model's tokenizer and chat template are stored in the book, named by their digest, so that every
gateway counts with the same bytes.  Tiers carry the platform's default
prices (R8); the tier is explicit per model, only suggested from its size.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from sqlalchemy import select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from marketplace.catalog.tables import models, tokenizers

TOKENIZER_BYTES_MAX: Final = 64 * 1024 * 1024
TEMPLATE_CHARACTERS_MAX: Final = 256 * 1024
SPECIAL_TOKENS: Final = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)  # fmt: skip
"""What transformers hands to a template by name."""


class CatalogError(Exception):
    """A model folder that cannot be taken into the catalogue; the message says why."""


class Tier(StrEnum):
    """Price tier of a model (R8)."""

    SMALL = "small"
    MEDIUM = "medium"
    LARGE = "large"
    PREMIUM = "premium"


@dataclass(frozen=True, slots=True)
class Price:
    """Nano-dollars per million tokens."""

    price_in: int
    price_out: int


DEFAULT_PRICES: Final[dict[Tier, Price]] = {
    Tier.SMALL: Price(100_000_000, 150_000_000),
    Tier.MEDIUM: Price(300_000_000, 500_000_000),
    Tier.LARGE: Price(800_000_000, 1_200_000_000),
    Tier.PREMIUM: Price(2_000_000_000, 3_000_000_000),
}
"""R8: $0.10/$0.15, $0.30/$0.50, $0.80/$1.20, $2.00/$3.00 per million tokens."""


def suggest_tier(parameters_billion: int) -> Tier:
    """Suggest a tier from a model's size in whole billions of parameters (R8).

    >>> [suggest_tier(n).value for n in (0, 7, 13, 34, 70, 405)]
    ['small', 'small', 'medium', 'medium', 'large', 'premium']
    """
    if parameters_billion < 13:
        return Tier.SMALL
    if parameters_billion < 70:
        return Tier.MEDIUM
    return Tier.LARGE if parameters_billion < 405 else Tier.PREMIUM


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """What counting needs of a model, by value."""

    tokenizer: bytes
    """The bytes of tokenizer.json."""
    chat_template: str
    special_tokens: dict[str, str]
    """Names a template may use: bos_token, eos_token, …"""

    @property
    def sha256(self) -> str:
        """The digest of all of it, by which it is stored: models share tokenizers, not always templates."""
        digest = hashlib.sha256(hashlib.sha256(self.tokenizer).digest())
        digest.update(json.dumps([self.chat_template, self.special_tokens], sort_keys=True).encode())
        return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Model:
    """One catalogue entry."""

    name: str
    tier: Tier
    context: int
    """Tokens, prompt and completion together."""
    tokenizer_sha256: str
    created_s: int


def read_model_folder(folder: Path) -> tuple[TokenizerFiles, int]:
    """Read tokenizer, template and context length from a Hugging Face model folder."""
    try:
        tokenizer = (folder / "tokenizer.json").read_bytes()
        configuration: dict[str, Any] = json.loads((folder / "config.json").read_bytes())
        described: dict[str, Any] = json.loads((folder / "tokenizer_config.json").read_bytes())
    except (OSError, ValueError) as e:
        raise CatalogError(f"{folder} is not a model folder: {e}") from e
    template = described.get("chat_template")
    if (folder / "chat_template.jinja").exists():  # which outranks the older place, as in transformers
        template = (folder / "chat_template.jinja").read_text()
    if not isinstance(template, str):
        raise CatalogError(f"{folder} has no chat template")
    if len(tokenizer) > TOKENIZER_BYTES_MAX or len(template) > TEMPLATE_CHARACTERS_MAX:
        raise CatalogError(f"{folder}: tokenizer or template is too large")
    special = {
        name: value if isinstance(value, str) else str(value["content"])
        for name in SPECIAL_TOKENS
        if (value := described.get(name))
    }
    context = int(configuration.get("max_position_embeddings", 2048))
    return TokenizerFiles(tokenizer, template, special), context


async def add_model(
    connection: AsyncConnection, *, name: str, tier: Tier, context: int, files: TokenizerFiles
) -> None:
    """Put a model on offer, or change its entry; operators may then serve it under `name`."""
    sha256 = files.sha256
    await connection.execute(
        insert(tokenizers)
        .values(
            sha256=sha256,
            tokenizer=files.tokenizer,
            chat_template=files.chat_template,
            special_tokens=json.dumps(files.special_tokens),
        )
        .on_conflict_do_nothing()
    )
    entry = {"tier": tier.value, "context": context, "tokenizer_sha256": sha256, "retired_at": None}
    await connection.execute(
        insert(models).values(name=name, **entry).on_conflict_do_update(index_elements=["name"], set_=entry)
    )


async def list_models(connection: AsyncConnection) -> list[Model]:
    """Every model on offer, by name."""
    rows = await connection.execute(
        select(models).where(models.c.retired_at.is_(None)).order_by(models.c.name)
    )
    return [
        Model(row.name, Tier(row.tier), row.context, row.tokenizer_sha256, int(row.created_at.timestamp()))
        for row in rows
    ]


async def load_tokenizer(connection: AsyncConnection, sha256: str) -> TokenizerFiles:
    """Read a tokenizer by digest; CatalogError if there is none, or its bytes are others."""
    row = (await connection.execute(select(tokenizers).where(tokenizers.c.sha256 == sha256))).one_or_none()
    if row is None:
        raise CatalogError(f"no tokenizer {sha256} is stored")
    files = TokenizerFiles(row.tokenizer, row.chat_template, json.loads(row.special_tokens))
    if files.sha256 != sha256:
        raise CatalogError(f"the stored tokenizer {sha256} has other bytes")
    return files
