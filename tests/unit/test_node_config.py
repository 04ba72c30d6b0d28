"""Settings: read strictly, changed without touching the operator's own words."""

import os
import stat
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import pytest
from typer.testing import CliRunner

from node_agent import config
from node_agent.cli import app as node_app
from node_agent.config import ConfigError, EngineSettings, Model, parse_config
from node_agent.identity import IdentityError, create_identity, load_identity
from node_agent.protocol import EnrollReply

REPLY = EnrollReply("node-1", "nats://127.0.0.1:4222", "Ann")
BASE = 'node_id = "n"\napi = "http://a"\nnats_url = "nats://b"\n'
ENGINE = '[[engines]]\nname = "e"\nkind = "attach"\nurl = "http://127.0.0.1:8000"\n'
MODEL = '[[engines.models]]\nname = "m"\ninput = "0.1"\noutput = 0.2\ncontext = 2048\n'


def first(folder: Path) -> Path:
    config.write_first_config(folder, REPLY, api="https://x", name='quo"te\\')
    return folder / config.CONFIG_FILE


def test_first_file_is_private_and_reads_back(tmp_path: Path) -> None:
    path = first(tmp_path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    read = config.load_config(tmp_path)
    assert (read.node_id, read.nats_url, read.name) == ("node-1", "nats://127.0.0.1:4222", 'quo"te\\')
    assert read.engines == []


def test_examples_in_the_comments_are_valid(tmp_path: Path) -> None:
    text = first(tmp_path).read_text()
    lines = text.splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("#   [[engines]]"))
    examples = [line.removeprefix("#   ") for line in lines[begin:] if line.startswith("#   ")]
    parsed = parse_config("\n".join(lines[:begin]) + "\n" + "\n".join(examples[:12]))
    assert parsed.models()[0][1].capacity == 32


def test_prices_may_be_text_or_numbers() -> None:
    ((_, model),) = parse_config(BASE + ENGINE + MODEL).models()
    assert (model.price_in, model.price_out) == (100_000_000, 200_000_000)
    ((_, model),) = parse_config((BASE + ENGINE + MODEL).replace("0.2", "3")).models()
    assert model.price_out == 3_000_000_000


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("node_id = \n", "line 1"),
        (BASE + "drian_seconds = 3\n", "line 4, drian_seconds: there is no such setting"),
        (BASE + "drain_seconds = -3\n", "line 4, drain_seconds"),
        (BASE + 'drain_seconds = "soon"\n', "line 4, drain_seconds"),
        ('node_id = "a.b"\napi = "http://a"\nnats_url = "nats://b"\n', "line 1, node_id"),
        ('api = "http://a"\nnats_url = "nats://b"\n', "node_id"),
        (BASE.replace("nats://b", "http://b"), "line 3, nats_url"),
        (BASE + ENGINE, "models"),
        (BASE + ENGINE.replace("attach", "launch") + MODEL, "kind"),
        (BASE + ENGINE.replace('url = "http://127.0.0.1:8000"', "") + MODEL, "needs a url"),
        (BASE + ENGINE + MODEL.replace("0.1", "-0.1"), "model 'm': a price is not negative"),
        (BASE + ENGINE + MODEL.replace('"0.1"', "0.12345678901"), "nine digits"),
        (BASE + ENGINE + MODEL + MODEL, "'m' appears twice"),
        (BASE + '[[engines]]\nname = "e"\nkind = "spawn"\n' + MODEL, "needs an argv"),
        (BASE + ENGINE.replace('"e"', '"../e"') + MODEL, "name"),
    ],
)
def test_mistakes_are_named(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(text)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tollway-node enroll"):
        config.load_config(tmp_path)


def attached(name: str = "a/b", price: str = "0.05") -> EngineSettings:
    model = Model(name=name, input=Decimal(price), output=Decimal("0.10"), context=4096)
    return EngineSettings(name=f"e{len(name)}", kind="attach", url="http://h", models=[model])


def test_engines_are_appended_and_a_second_of_the_same_name_is_refused(tmp_path: Path) -> None:
    path = first(tmp_path)
    path.write_text(path.read_text() + "# my own words\n")
    config.add_engine(tmp_path, attached())
    spawn = EngineSettings(
        name="s",
        kind="spawn",
        argv=["{python}", 'a"b'],
        python="/p",
        model_path="/m",
        environment={"A.B": "1"},
        models=[Model(name="two", input=Decimal(1), output=Decimal(2), context=64)],
    )
    read = config.add_engine(tmp_path, spawn)
    assert [model.name for _, model in read.models()] == ["a/b", "two"]
    assert read.engines[1].argv == spawn.argv
    assert read.engines[1].environment == spawn.environment
    assert "# my own words" in path.read_text()
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="twice"):
        config.add_engine(tmp_path, attached())
    assert path.read_bytes() == before


def test_prices_change_in_their_own_lines_only(tmp_path: Path) -> None:
    path = first(tmp_path)
    config.add_engine(tmp_path, attached("one"))
    config.add_engine(tmp_path, attached("three", "0.07"))
    path.write_text(path.read_text().replace('input = "0.07"', "input = 0.07 # was cheaper"))
    before = path.read_text().splitlines()
    read = config.set_price(tmp_path, "three", price_in="0.0002", price_out=None, per="1k")
    assert [model.price_in for _, model in read.models()] == [50_000_000, 200_000_000]
    changed = [new for old, new in zip(before, path.read_text().splitlines(), strict=True) if old != new]
    assert [line.strip() for line in changed] == [
        'input = "0.20" # was cheaper    # dollars per million tokens',
    ]
    with pytest.raises(ConfigError, match="models: one, three"):
        config.set_price(tmp_path, "four", price_in="1", price_out=None, per="1m")


def test_a_removed_model_takes_its_lines_and_an_empty_engine(tmp_path: Path) -> None:
    path = first(tmp_path)
    config.add_engine(tmp_path, attached("one"))
    before = path.read_text()
    two = ENGINE.replace('"e"', '"both"') + MODEL.replace('"m"', '"x"') + MODEL.replace('"m"', '"y"')
    spawned = (
        '[[engines]]\nname = "s"\nkind = "spawn"\nargv = ["a"]\n[engines.environment]\nA = "1"\n' + MODEL
    )
    path.write_text(before + "\n# two of mine\n" + two + "\n# a large one\n" + spawned)
    assert [model.name for _, model in config.remove_model(tmp_path, "x").models()] == ["one", "y", "m"]
    assert [model.name for _, model in config.remove_model(tmp_path, "y").models()] == ["one", "m"]
    assert "# two of mine" in path.read_text()
    assert [engine.name for engine in config.remove_model(tmp_path, "m").engines] == ["e3"]
    assert path.read_text().startswith(before.rstrip())
    assert config.remove_model(tmp_path, "one").engines == []
    with pytest.raises(ConfigError, match="no model 'one' here; models: none"):
        config.remove_model(tmp_path, "one")


def test_a_model_whose_lines_are_not_found_stays(tmp_path: Path) -> None:
    path = first(tmp_path)
    inline = 'models = [{ name = "m", input = "0.1", output = "0.1", context = 64 }]\n'
    path.write_text(path.read_text() + ENGINE + inline)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="could not find the lines of 'm'"):
        config.remove_model(tmp_path, "m")
    assert path.read_bytes() == before


CHANGE_EVERYTHING = """
import sys
from decimal import Decimal
from pathlib import Path
from node_agent.config import EngineSettings, Model, add_engine, remove_model, set_price

folder = Path(sys.argv[1])
made = Model(name="one", input=Decimal(1), output=Decimal(2), context=64)
add_engine(folder, EngineSettings(name="first", kind="attach", url="http://h", models=[made]))
set_price(folder, "one", price_in="3", price_out=None, per="1m")
remove_model(folder, "one")
"""


def test_settings_are_utf8_whatever_the_locale(tmp_path: Path) -> None:
    path = first(tmp_path)
    path.write_text(path.read_text(encoding="utf-8") + "# für Zoë\n" + ENGINE + MODEL, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", CHANGE_EVERYTHING, tmp_path],
        env={"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "# für Zoë\n" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("end", ["\u2028", "\x85"])
def test_only_tomls_own_line_ends_end_a_line(tmp_path: Path, end: str) -> None:
    path = first(tmp_path)
    ours = MODEL.replace('"m"', f'"m"  # cheap{end}and good')
    path.write_text(path.read_text() + ENGINE + ours)
    before = path.read_text()
    config.set_price(tmp_path, "m", price_in="0.3", price_out=None, per="1m")
    assert path.read_text() == before.replace('"0.1"', '"0.30"')
    assert config.remove_model(tmp_path, "m").engines == []
    path.write_text(f"{BASE}# cheap{end}and good\ndrain_seconds = -3\n")
    with pytest.raises(ConfigError, match="line 5, drain_seconds"):
        config.load_config(tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        ENGINE + MODEL + 'engine_name = """\n[x]"""\n',
        '[[engines]]\nname = "s"\nkind = "spawn"\nargv = ["a"]\n'
        + MODEL
        + '[engines.environment]\nA = """\n[x]"""\n',
    ],
    ids=["model", "engine"],
)
def test_a_bracket_inside_a_text_is_not_taken_for_a_table(tmp_path: Path, settings: str) -> None:
    path = first(tmp_path)
    path.write_text(path.read_text() + settings)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="could not find the lines of 'm'"):
        config.remove_model(tmp_path, "m")
    assert path.read_bytes() == before


def test_the_price_of_a_model_whose_lines_are_not_found_stays(tmp_path: Path) -> None:
    path = first(tmp_path)
    path.write_text(path.read_text() + ENGINE + MODEL + 'engine_name = """\n[x]"""\n')
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="could not find the price lines of 'm'"):
        config.set_price(tmp_path, "m", price_in="0.3", price_out=None, per="1m")
    assert path.read_bytes() == before


def test_an_engine_of_a_taken_name_gets_a_number(tmp_path: Path) -> None:
    first(tmp_path)
    for name in ("my-model", "my/model", "my model"):
        at = ("--attach", "http://h", "--input", "1", "--output", "1", "--data-dir", str(tmp_path))
        done = CliRunner().invoke(node_app, ["models", "add", name, *at])
        assert done.exit_code == 0, done.output
    read = config.load_config(tmp_path)
    assert [(engine.name, model.name) for engine, model in read.models()] == [
        ("my-model", "my-model"),
        ("my-model-2", "my/model"),
        ("my-model-3", "my model"),
    ]


def test_enrolling_again_adds_what_was_deleted_above_the_engines(tmp_path: Path) -> None:
    path = first(tmp_path)
    deleted = path.read_text().replace('name = "quo\\"te\\\\"\n', "", 1)
    path.write_text(deleted + "# my own words\n" + ENGINE + MODEL)
    assert config.load_config(tmp_path).name == ""
    config.write_first_config(tmp_path, REPLY, api="https://y", name="new")
    read = config.load_config(tmp_path)
    assert (read.name, read.api, read.engines[0].name) == ("new", "https://y", "e")
    assert "# my own words" in path.read_text()
    config.write_first_config(tmp_path, REPLY, api="https://y", name="newer")
    assert config.load_config(tmp_path).name == "newer"


def test_enrolling_again_keeps_the_engines(tmp_path: Path) -> None:
    first(tmp_path)
    config.add_engine(tmp_path, attached())
    again = EnrollReply("node-2", "nats://127.0.0.1:5", "")
    config.write_first_config(tmp_path, again, api="https://y", name="new")
    read = config.load_config(tmp_path)
    assert (read.node_id, read.nats_url, read.api, read.name) == (
        "node-2",
        "nats://127.0.0.1:5",
        "https://y",
        "new",
    )
    assert len(read.engines) == 1


def test_identity_is_made_once_and_private(tmp_path: Path) -> None:
    made = create_identity(tmp_path)
    path = tmp_path / "key.seed"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert create_identity(tmp_path).public_key == load_identity(tmp_path).public_key == made.public_key
    path.chmod(0o644)
    with pytest.raises(IdentityError, match="chmod 600"):
        load_identity(tmp_path)
    path.write_text("SUnonsense")
    os.chmod(path, 0o600)  # noqa: PTH101
    with pytest.raises(IdentityError, match="no node key"):
        load_identity(tmp_path)
