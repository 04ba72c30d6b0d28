"""House rules that no linter knows.

Each allow-list is short, gives a reason per entry, and fails when an entry is no longer needed.
"""

from __future__ import annotations

import ast
import itertools
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).resolve().parents[2]
PACKAGES: Final = ("chain", "marketplace", "node_agent")

COMMITTERS: Final = {
    ("marketplace/platform/database.py", "connection.begin"): "the one place",
    ("marketplace/ledger/lane.py", "driver.transaction"): "the poster is an edge; below SQLAlchemy for COPY",
    ("marketplace/ledger/lane.py", "connection.begin"): "the same, its two accounts; ledger imports nothing",
    ("marketplace/ledger/lease_keeper.py", "self._engine.begin"): "an edge; ledger imports nothing",
    ("marketplace/accounts/wallets.py", "connection.begin_nested"): "a savepoint: ends nothing but itself",
    ("marketplace/accounts/wallets.py", "savepoint.commit"): "the same",
    ("marketplace/migrations/env.py", "engine.begin"): "Alembic's edge",
}
AUTOCOMMITTERS: Final = {
    "marketplace/platform/database.py": "CREATE and DROP DATABASE",
    "marketplace/settlement/service.py": "a session's advisory lock",
    "marketplace/deposits/watcher.py": "a session's advisory lock",
}
CLOCKS: Final = {
    ("marketplace/platform/clock.py", "datetime.now"): "the place",
    ("marketplace/platform/clock.py", "time.monotonic"): "the place",
    (
        "marketplace/metering/counting.py",
        "datetime.now",
    ): "chat templates may print today's date, as engines do",
    ("marketplace/platform/ids.py", "time.time_ns"): "uuid7; tests give the milliseconds",
    ("marketplace/ledger/ids.py", "time.time_ns"): "uuid7; ledger imports nothing",
}
CLOCKLESS: Final = (
    *(f"marketplace/{name}/" for name in (
        "accounts", "catalog", "deposits", "fabric", "gateway", "ledger", "metering", "notices", "platform",
        "routing", "settlement",
    )),
    *(f"chain/{name}" for name in (
        "evm/", "solana/", "quorum.py", "headers.py", "deposits.py", "payouts.py",
    )),
)  # fmt: skip
"""Where time is an argument; composition, the development chains and the agent may ask the machine."""
MACHINE_CLOCKS: Final = {
    *("datetime.now", "datetime.utcnow", "datetime.today", "date.today", "time.time", "time.time_ns"),
}

MONEY_PURE: Final = (
    *(f"marketplace/ledger/{name}.py" for name in (
        "accounts", "charges", "lease_book", "leases", "money", "posting", "templates",
    )),
    "marketplace/metering/settlement.py", "marketplace/catalog/prices.py",
    "chain/units.py", "node_agent/prices.py",
)  # fmt: skip
"""No float at all."""
MONEY_PACKAGES: Final = ("marketplace/ledger/", "marketplace/settlement/", "marketplace/deposits/")
"""Floats are seconds, and say so in the name."""
SECONDS: Final = re.compile(r"_(s|S)(_max|_min|_MAX|_MIN)?$|_at$|^(seconds|_?last_sent)$")
SLEEPERS: Final = {"sleep", "wait_for", "timeout", "_wait"}

FOREIGN: Final = {
    r"web3|solana|spl": (),
    r"eth_\w+|hexbytes": ("chain/evm/", "chain/localnet/"),
    r"solders": ("chain/solana/", "chain/localnet/"),
    r"nkeys": (
        "marketplace/fabric/nkey_jwt.py", "marketplace/platform/embedded_nats.py",
        "marketplace/platform/nats_configuration.py", "node_agent/identity.py", "node_agent/receipts.py",
    ),
    r"nats": ("node_agent/service.py", "node_agent/fabric_link.py"),
    r"stripe": ("marketplace/billing/",),
    r"requests|httpx": ("marketplace/stack/",),
}  # fmt: skip
"""Third-party package -> the only places that import it."""

DOMAIN_PACKAGES: Final = (
    "chain", "chain/solana", "node_agent",
    *(f"marketplace/{name}" for name in (
        "accounts", "catalog", "deposits", "fabric", "gateway", "ledger", "metering", "notices",
        "reputation", "routing", "settlement",
    )),
)  # fmt: skip
TRACKED_BYTES_MAX: Final = 1024 * 1024


@cache
def tracked() -> tuple[str, ...]:
    """Every file of the project that is there; from git where there is one, else by looking."""
    if (ROOT / ".git").exists():
        listed = subprocess.run(
            ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True
        )
        return tuple(name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file())
    skipped = {".venv", ".bench", ".engine", "node_modules", "var", "__pycache__", "dist"}
    found = (path for path in ROOT.rglob("*") if path.is_file())
    names = (path.relative_to(ROOT) for path in found)
    return tuple(
        sorted(str(n) for n in names if not skipped & set(n.parts) and not n.parts[0].endswith("_cache"))
    )


def sources(*prefixes: str) -> Iterator[tuple[str, ast.Module]]:
    for name in tracked():
        if name.endswith(".py") and name.startswith(prefixes or tuple(f"{p}/" for p in PACKAGES)):
            yield name, parsed(name)


@cache
def parsed(name: str) -> ast.Module:
    return ast.parse((ROOT / name).read_text(), name)


def calls(tree: ast.AST) -> Iterator[tuple[ast.Call, str]]:
    """Calls of attributes, as written: `engine.begin`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            yield node, ast.unparse(node.func)


def test_only_the_edge_commits() -> None:
    """`database.transaction(engine)` is how everybody else does it."""
    found = {
        (name, written)
        for name, tree in sources("marketplace/")
        for call, written in calls(tree)
        if written.rpartition(".")[2] in {"begin", "begin_nested", "commit", "transaction"}
        and written not in {"database.transaction", "lanes.commit"}  # our own functions
        and not (written.endswith(".begin") and call.args)  # nothing of a database takes one
    }
    assert found == set(COMMITTERS)


def test_autocommit_is_for_locks_and_databases() -> None:
    found = {name for name, _ in sources() if "AUTOCOMMIT" in (ROOT / name).read_text()}
    assert found == set(AUTOCOMMITTERS)


def test_one_place_asks_the_machine_for_the_time() -> None:
    found = {
        (name, written)
        for name, tree in sources(*CLOCKLESS)
        for _, written in calls(tree)
        if written in MACHINE_CLOCKS or (written == "time.monotonic" and name.endswith("clock.py"))
    }
    assert found == set(CLOCKS)


@pytest.mark.parametrize("name", MONEY_PURE)
def test_no_float_in_a_money_module(name: str) -> None:
    assert list(floats(parsed(name))) == []


def test_floats_near_money_are_seconds() -> None:
    found = [
        f"{name}:{node.lineno}"
        for name, tree in sources(*MONEY_PACKAGES)
        for node in floats(tree)
        if not is_duration(tree, node)
    ]
    assert found == []


def floats(tree: ast.AST) -> Iterator[ast.expr]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, float):
            yield node
        if isinstance(node, ast.Name) and node.id == "float":
            yield node


def is_duration(tree: ast.AST, wanted: ast.expr) -> bool:
    """Tell whether a float is the annotation, value or argument of something named as seconds."""
    for node in ast.walk(tree):
        names: list[str] = []
        match node:
            case ast.arg(arg=name) if node.annotation is not None and holds(node.annotation, wanted):
                names = [name]
            case ast.arguments():
                last = (*node.posonlyargs, *node.args)
                pairs = itertools.chain(
                    zip(reversed(last), reversed(node.defaults), strict=False),
                    zip(node.kwonlyargs, node.kw_defaults, strict=True),
                )
                names = [arg.arg for arg, default in pairs if default is not None and holds(default, wanted)]
            case ast.AnnAssign(target=target) if holds(node, wanted):
                names = [ast.unparse(target)]
            case ast.Assign(targets=[target]) if holds(node.value, wanted):
                names = [ast.unparse(target)]
            case ast.keyword(arg=str(name)) if holds(node.value, wanted):
                names = [name]
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) if node.returns is not None:
                names = [name] if holds(node.returns, wanted) else []
            case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)):
                is_argument = any(holds(argument, wanted) for argument in node.args)
                if is_argument and name in SLEEPERS:
                    return True
        if any(SECONDS.search(name) for name in names):
            return True
    return False


def holds(tree: ast.AST, wanted: ast.AST) -> bool:
    return any(node is wanted for node in ast.walk(tree))


def test_a_float_that_is_money_is_found() -> None:
    """The rule above can fail."""
    tree = ast.parse("fee: float = 0.2\ndef pay(amount: float = 1.5) -> None:\n    credit(0.1)")
    assert [is_duration(tree, node) for node in floats(tree)] == [False] * 5
    tree = ast.parse("WAIT_S = 0.2\ndef rest(pause_s: float = 1.5) -> None:\n    sleep(0.1)")
    assert [is_duration(tree, node) for node in floats(tree)] == [True] * 4


def test_other_peoples_packages_stay_where_they_belong() -> None:
    found = [
        f"{name} imports {package}"
        for name, tree in sources()
        for package in imported(tree)
        for pattern, places in FOREIGN.items()
        if re.fullmatch(pattern, package) and not name.startswith(places or ("nowhere",))
    ]
    assert found == []


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


def test_marketplace_knows_of_the_agent_its_protocol_alone() -> None:
    found = {
        f"{name} imports {node.module}"
        for name, tree in sources("marketplace/")
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "node_agent"
        if node.module != "node_agent.protocol"
        and (node.module, node.names[0].name) != ("node_agent", "protocol")
    }
    assert found == set()


def test_no_module_is_a_drawer() -> None:
    drawers = re.compile(r"(^|/)(\w*_)?(utils?|helpers?|common|misc|managers?)(/|\.py$)")
    assert [name for name in tracked() if name.endswith(".py") and drawers.search(name)] == []


def test_every_module_says_its_one_idea() -> None:
    assert [name for name, tree in sources(*(f"{p}/" for p in PACKAGES), "setup/", "engine/")
            if not ast.get_docstring(tree)] == []  # fmt: skip


@pytest.mark.parametrize("package", DOMAIN_PACKAGES)
def test_every_domain_package_has_a_readme(package: str) -> None:
    assert f"{package}/README.md" in tracked()


def test_no_large_file_is_tracked() -> None:
    assert [name for name in tracked() if (ROOT / name).stat().st_size > TRACKED_BYTES_MAX] == []


def test_no_lock_names_a_host() -> None:
    locks = [name for name in tracked() if name.endswith(".lock") or name == "package-lock.json"]
    assert {"requirements/dev.lock", "package-lock.json"} <= set(locks)
    assert [
        name for name in locks if re.search(r"://|\bresolved\b|--index|git\+", (ROOT / name).read_text())
    ] == []
    assert not {"uv.lock", "poetry.lock"} & set(tracked())


def test_every_locked_package_has_a_hash() -> None:
    for name in (n for n in tracked() if n.startswith("requirements/") and n.endswith(".lock")):
        entries = re.split(r"\n(?=\S)", (ROOT / name).read_text().strip())
        assert [entry.split("\n")[0] for entry in entries if "--hash=sha256:" not in entry] == [], name


def test_no_file_speaks_of_one_machine() -> None:
    """A path of somebody's own machine helps nobody else."""
    folders = ("work/", "home/[a-z]", "root/")
    places = re.compile("|".join((*(r"(?<![\w.])/" + folder for folder in folders), r"\bshared[/]")))
    found = []
    for name in tracked():
        try:
            text = (ROOT / name).read_text()
        except UnicodeDecodeError:
            continue
        found += [f"{name}: {match.group()}" for match in places.finditer(text)]
    assert found == []


def test_attack_tests_are_named_after_their_rows() -> None:
    folder = "tests/attacks/"
    names = [
        name.removeprefix(folder) for name in tracked() if name.startswith(folder) and name.endswith(".py")
    ]
    assert names
    assert [n for n in names if not re.fullmatch(r"test_a\d\d(_to_a\d\d)?_[a-z0-9_]+\.py", n)] == []


def test_test_files_have_names_of_their_own() -> None:
    names = [Path(name).name for name in tracked() if name.startswith("tests/") and name.endswith(".py")]
    assert sorted(names) == sorted(set(names))
    assert "__init__.py" not in names
