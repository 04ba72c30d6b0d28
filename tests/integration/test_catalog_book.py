"""Models, tokenizers and price versions on PostgreSQL."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from gateway_parts import MODEL
from letters import CHATML, letters_tokenizer, prompt_tokens, tokenizer_files
from sqlalchemy import func, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine

from marketplace.app import _counter_of
from marketplace.catalog.aliases import list_aliases, set_alias
from marketplace.catalog.models import (
    CatalogError,
    Tier,
    TokenizerFiles,
    add_model,
    list_models,
    load_tokenizer,
    read_model_folder,
)
from marketplace.catalog.prices import PriceBook
from marketplace.catalog.shelf import Shelf
from marketplace.catalog.tables import price_versions, tokenizers
from marketplace.metering.counting import TokenCounter
from marketplace.platform.database import connect, transaction
from marketplace.stack import stack as stack_module
from marketplace.stack.folder import StackFolder
from marketplace.stack.stack import MODELS, Ports, Stack


async def test_a_price_has_one_version_however_many_ask(engine: AsyncEngine) -> None:
    books = [PriceBook(engine) for _ in range(4)]
    first = await asyncio.gather(*(book.version_of("n-1", MODEL, 1, 2) for book in books * 3))
    assert len(set(first)) == 1
    raised = await books[0].version_of("n-1", MODEL, 5, 2)
    assert raised > first[0]
    assert await books[1].version_of("n-1", MODEL, 5, 2) == raised
    back = await books[0].version_of("n-1", MODEL, 1, 2)
    assert back > raised  # an old price again is a new fact
    assert await books[2].version_of("n-2", MODEL, 1, 2) not in {first[0], raised, back}
    async with engine.connect() as connection:
        assert await connection.scalar(select(func.count()).select_from(price_versions)) == 4


async def test_price_versions_are_never_rewritten(engine: AsyncEngine) -> None:
    await PriceBook(engine).version_of("n-1", MODEL, 1, 2)
    for statement in ("UPDATE price_versions SET price_in = 0", "DELETE FROM price_versions"):
        with pytest.raises(DBAPIError, match="permission denied"):
            async with transaction(engine) as connection:
                await connection.execute(text(statement))


async def test_models_that_share_a_tokenizer_keep_their_templates(database_url: str) -> None:
    owner = connect(database_url, role=None)
    plain, other = tokenizer_files(), TokenizerFiles(tokenizer_files().tokenizer, CHATML + "x", {})
    async with transaction(owner) as connection:
        await add_model(connection, name="a", tier=Tier.SMALL, context=10, files=plain)
        await add_model(connection, name="b", tier=Tier.LARGE, context=20, files=other)
        await add_model(connection, name="a", tier=Tier.MEDIUM, context=30, files=plain)
    async with owner.connect() as connection:
        found = await list_models(connection)
        assert [(model.name, model.tier, model.context) for model in found] == [
            ("a", Tier.MEDIUM, 30),
            ("b", Tier.LARGE, 20),
        ]
        loaded = [await load_tokenizer(connection, model.tokenizer_sha256) for model in found]
        assert loaded == [plain, other]
    await owner.dispose()


async def test_a_tokenizer_with_other_bytes_is_not_believed(database_url: str) -> None:
    owner = connect(database_url, role=None)
    files = tokenizer_files()
    async with transaction(owner) as connection:
        await add_model(connection, name=MODEL, tier=Tier.SMALL, context=10, files=files)
        await connection.execute(tokenizers.update().values(chat_template="{{ 'short' }}"))
    async with owner.connect() as connection:
        with pytest.raises(CatalogError, match="other bytes"):
            await load_tokenizer(connection, files.sha256)
        with pytest.raises(CatalogError, match="no tokenizer"):
            await load_tokenizer(connection, "0" * 64)
    await owner.dispose()


async def test_the_shelf_loads_once_and_learns_of_changes(database_url: str) -> None:
    owner = connect(database_url, role=None)
    built = 0

    def build(files: TokenizerFiles) -> TokenCounter:
        nonlocal built
        built += 1
        return _counter_of(files)

    shelf: Shelf[TokenCounter] = Shelf(owner, build)
    await shelf.start()
    assert shelf.models() == []
    async with transaction(owner) as connection:
        await add_model(connection, name=MODEL, tier=Tier.SMALL, context=10, files=tokenizer_files())
    await shelf.refresh()
    counters = await asyncio.gather(*(shelf.counter_of(MODEL) for _ in range(5)))
    assert built == 1
    assert len(counters[0].prompt_ids([{"role": "user", "content": "Hi"}])) == prompt_tokens("Hi")
    async with transaction(owner) as connection:
        changed = TokenizerFiles(tokenizer_files().tokenizer, "x" + CHATML, {})
        await add_model(connection, name=MODEL, tier=Tier.SMALL, context=10, files=changed)
    await shelf.refresh()
    counter = await shelf.counter_of(MODEL)
    assert len(counter.prompt_ids([{"role": "user", "content": "Hi"}])) == prompt_tokens("Hi") + 1
    with pytest.raises(KeyError):
        await shelf.counter_of("none")
    await shelf.stop()
    await owner.dispose()


def test_a_model_folder_is_read_or_refused(tmp_path: Path) -> None:
    with pytest.raises(CatalogError, match="not a model folder"):
        read_model_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(letters_tokenizer().to_str().encode())
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 77}))
    described = {"bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(described))
    with pytest.raises(CatalogError, match="no chat template"):
        read_model_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**described, "chat_template": "old"}))
    assert read_model_folder(tmp_path)[0].chat_template == "old"
    (tmp_path / "chat_template.jinja").write_text("newer")
    files, context = read_model_folder(tmp_path)
    assert (files.chat_template, context) == ("newer", 77)
    assert files.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}


async def test_the_stack_offers_its_model_under_the_short_name_of_the_documents(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = connect(database_url, role=None)
    monkeypatch.setattr(stack_module, "ENGINE", tmp_path)
    for short, model in MODELS.items():
        folder = tmp_path / "models" / model.folder
        folder.mkdir(parents=True)
        (folder / "tokenizer.json").write_bytes(letters_tokenizer().to_str().encode())
        (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 77}))
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHATML}))
        stack = Stack(StackFolder(tmp_path), Ports.any(), model, lambda _: None)
        await stack._offer_model(owner)
        shelf: Shelf[TokenCounter] = Shelf(owner, _counter_of)
        await shelf.refresh()
        assert [found.name for found in shelf.resolve(short)] == [model.name]
    async with transaction(owner) as connection:
        await set_alias(connection, "smollm2", ["tiny"])
    stack = Stack(StackFolder(tmp_path), Ports.any(), MODELS["smollm2"], lambda _: None)
    await stack._offer_model(owner)
    async with owner.connect() as connection:
        assert await list_aliases(connection) == {"smollm2": ("tiny",)}  # its owner's word stays
    await owner.dispose()
