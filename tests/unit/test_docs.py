"""What the documents say exists: links, tasks, commands with their options, routes."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Final

import pytest
import typer.main
from fastapi import FastAPI

from marketplace.cli import app as tollway
from node_agent.cli import app as tollway_node

ROOT: Final = Path(__file__).resolve().parents[2]
SKIPPED: Final = {".venv", ".bench", ".engine", "node_modules", "var", ".git"}
COMMANDS: Final = {
    "tollway": typer.main.get_command(tollway),
    "tollway-node": typer.main.get_command(tollway_node),
}
DOCUMENTS: Final = sorted(
    path for path in ROOT.rglob("*.md") if not SKIPPED & set(path.relative_to(ROOT).parts)
)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(text: str) -> Iterator[str]:
    """Every code block, indented or fenced."""
    yield from re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    for found in re.findall(r"(?:^ {4}.*\n|^\n(?= {4}))+", text, re.MULTILINE):
        yield re.sub(r"^ {4}", "", found, flags=re.MULTILINE)


def shown_commands(text: str) -> Iterator[list[str]]:
    """Complete `tollway …` and `tollway-node …` calls in code blocks, as a shell would split them."""
    for block in blocks(text):
        for line in block.replace("\\\n", " ").splitlines():
            found = re.search(r"(?:^|\s|\$\()(?:\.venv/bin/)?(tollway(?:-node)?)(?= )(.*)$", line)
            if found and not re.match(r"\s*#", line):
                yield shlex.split(found.group(1) + found.group(2).rstrip(")"), comments=True)


def refusal(words: list[str]) -> str | None:
    """Say why the command line would refuse this call, None if it takes it; runs nothing."""
    command: Any = COMMANDS[words[0]]
    rest = words[1:]
    while hasattr(command, "commands"):
        if not rest or rest[0] not in command.commands:
            return f"{words[0]} has no command {rest[:1]}"
        command, rest = command.commands[rest[0]], rest[1:]
    try:
        command.make_context(command.name, rest)
    except Exception as e:  # click's own, of which typer has a private copy
        return f"{type(e).__name__}: {e}"
    return None


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(path: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", path.read_text())
    local = [link.partition("#")[0] for link in links if not re.match(r"[a-z]+:", link)]
    assert [link for link in local if link and not (path.parent / link).exists()] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_tasks_named_exist(path: Path) -> None:
    named = set(re.findall(r"(?:`|^ {4}|^)make ([a-z]+)(?=[`\s]|$)", path.read_text(), re.MULTILINE))
    tasks = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert named - tasks == set()


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_commands_shown_would_be_taken(path: Path) -> None:
    refused = {" ".join(words): refusal(words) for words in shown_commands(path.read_text())}
    assert {call: why for call, why in refused.items() if why} == {}


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_commands_mentioned_exist(path: Path) -> None:
    """In running text a command stands without its arguments, maybe with alternatives: `enroll|run`."""
    for name, said in re.findall(r"`(tollway(?:-node)?) ([a-z][a-z |-]*)[^`]*`", path.read_text()):
        first, *more = (set(word.split("|")) for word in said.split())
        command: Any = COMMANDS[name]
        assert first <= set(command.commands), said
        inner = getattr(command.commands[next(iter(first))], "commands", None)
        if inner and more:
            assert more[0] <= set(inner), said


def test_a_wrong_command_is_noticed() -> None:
    """The rules above can fail."""
    assert refusal(["tollway", "batch", "plan", "--chain", "base", "--as", "paula"]) is None
    assert refusal(["tollway", "batch", "plan"])
    assert refusal(["tollway", "batch", "plan", "--chain", "bitcoin", "--as", "paula"])
    assert refusal(["tollway", "batch", "bake"])
    assert refusal(["tollway-node", "run", "--faster"])


def test_readme_shows_every_role_its_commands() -> None:
    shown = {" ".join(words[:2]) for words in shown_commands((ROOT / "README.md").read_text())}
    assert {
        "tollway-node enroll",
        "tollway-node models",
        "tollway-node run",
        "tollway batch",
        "tollway sign",
    } <= shown


@cache
def routes() -> list[tuple[str, re.Pattern[str]]]:
    """(method, path) of every route of the gateway."""
    from marketplace.app import ROUTERS

    app = FastAPI()
    for router in ROUTERS:
        app.include_router(router)
    found = []
    for path, methods in app.openapi()["paths"].items():
        parts = ("[^/]+" if part.startswith("{") else re.escape(part) for part in path.split("/"))
        pattern = re.compile("/".join(parts))
        found += [(method.upper(), pattern) for method in methods]
    return found


def exists(method: str, path: str) -> bool:
    return any(m == method and pattern.fullmatch(path) for m, pattern in routes())


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_curls_meet_a_route(path: Path) -> None:
    for block in blocks(path.read_text()):
        for call in re.findall(r"curl .*", block.replace("\\\n", " ")):
            target = re.search(r"\$API(/[^\s?\"]*)", call)
            assert target is not None, call
            explicit = re.search(r"-X (\w+)", call)
            method = explicit.group(1) if explicit else "POST" if re.search(r" -d ", call) else "GET"
            assert exists(method, target.group(1)), call


def test_routes_named_in_the_readme_exist() -> None:
    for path in re.findall(r"`(/(?:api|v1)/[\w/-]+)`", (ROOT / "README.md").read_text()):
        assert exists("GET", path) or exists("POST", path), path


def test_python_in_the_readme_is_python() -> None:
    snippets = re.findall(
        r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE
    )
    assert snippets
    for snippet in snippets:
        ast.parse(snippet)


def test_every_decision_is_listed_and_has_its_parts() -> None:
    folder = ROOT / "docs" / "adr"
    index = (folder / "README.md").read_text()
    records = sorted(folder.glob("[0-9]*.md"))
    assert [record.name[:4] for record in records] == [f"{n:04}" for n in range(1, len(records) + 1)]
    for record in records:
        text = record.read_text()
        assert record.name in index
        assert text.startswith(f"# {record.name[:4]}. ")
        assert re.findall(r"^## (.*)$", text, re.MULTILINE) == [
            "Context",
            "Decision",
            "Consequences",
            "Measured",
        ]
