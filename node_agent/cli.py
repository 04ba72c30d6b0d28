"""`tollway-node`: what an operator types."""

import asyncio
import contextlib
import itertools
import logging
import signal
import sys
import time
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Final, get_args

import msgspec
import typer
from rich.markup import escape

from node_agent import (
    account_commands,
    config_commands,
    doctor_command,
    engine_commands,
    receipt_commands,
    service_commands,
    status_view,
)
from node_agent import config as settings
from node_agent.config import ConfigError, EngineSettings, Model
from node_agent.core_files import forbid_core_files
from node_agent.enroll import enroll
from node_agent.identity import create_identity, load_identity
from node_agent.prices import Per, PriceError, format_price, parse_price
from node_agent.service import Service
from node_agent.terminal import (
    HOME,
    DataDir,
    Json,
    JsonLines,
    out,
    plain_errors,
    print_json,
    print_table,
    version,
)

LOCK_FILE: Final = "agent.lock"

app = typer.Typer(
    help="Run a Tollway node: serve models from your own engine, at your own price.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
prices_app = typer.Typer(help="What your models cost.", no_args_is_help=True)
models_app = typer.Typer(help="Which models you offer, and from which engine.", no_args_is_help=True)
app.add_typer(prices_app, name="prices")
app.add_typer(models_app, name="models")

for commands in (
    status_view,
    account_commands,
    doctor_command,
    config_commands,
    service_commands,
    engine_commands,
    receipt_commands,
):
    commands.add_to(app)


# -- enrol ----------------------------------------------------------------------------------------


@app.command("enroll")
def enroll_command(
    token: Annotated[
        str, typer.Argument(help="The one-use token from the operator page; - reads it from standard input.")
    ],
    api: Annotated[
        str, typer.Option("--api", help="The marketplace's address, such as https://tollway.example.")
    ],
    data_dir: DataDir = HOME,
    name: Annotated[str, typer.Option(help="A name for this machine.")] = "",
    as_json: Json = False,
) -> None:
    """Bind this machine to your operator account."""
    if token == "-":  # noqa: S105 - keeps it out of the list of processes and the shell's history
        token = sys.stdin.readline().strip()
    with plain_errors():
        identity = create_identity(data_dir)
        request = identity.enroll_request(
            token=token, name=name, time_ms=time.time_ns() // 1_000_000, agent_version=version()
        )
        reply = asyncio.run(enroll(api, request))
        settings.write_first_config(data_dir, reply, api=api, name=name)
    if as_json:
        print_json({"node_id": reply.node_id, "public_key": identity.public_key, "data_dir": str(data_dir)})
        return
    operator = escape(reply.operator or "your account")
    out.print(f"This machine is node [bold]{reply.node_id}[/] of {operator}.")
    out.print(
        f"Now add a model: tollway-node models add NAME …   (settings: {data_dir / settings.CONFIG_FILE})",
        markup=False,
    )


# -- run ------------------------------------------------------------------------------------------


@app.command()
def run(
    data_dir: DataDir = HOME,
    nats_url: Annotated[
        str,
        typer.Option(envvar="TOLLWAY_NODE_NATS_URL", help="Another fabric address than the enrolled one."),
    ] = "",
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
    as_json: Annotated[bool, typer.Option("--json", help="Log one JSON object per line.")] = False,
) -> None:
    """Serve until Ctrl-C or SIGTERM; running requests are finished first, a second signal cuts them."""
    with plain_errors():
        level = logging.getLevelNamesMapping().get(log_level.upper())
        if level is None:
            raise ConfigError(f"no log level {log_level!r}; choose debug, info, warning or error")
        logging.basicConfig(
            level=level, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
        )
        if as_json:
            logging.getLogger().handlers[0].setFormatter(JsonLines())
        config = settings.load_config(data_dir)
        if nats_url:
            config = msgspec.structs.replace(config, nats_url=nats_url)
        identity = load_identity(data_dir)
        forbid_core_files()  # of this process and, inherited, of its engines
        with _only_one(data_dir):
            service = Service(config, identity, data_dir, version=version())
            asyncio.run(_serve(service))


async def _serve(service: Service) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        _on_signal(loop, number, service.stop)
    await service.run()


def _on_signal(loop: asyncio.AbstractEventLoop, number: int, action: Callable[[], None]) -> None:
    try:
        loop.add_signal_handler(number, action)
    except NotImplementedError:  # Windows
        signal.signal(number, lambda *_: loop.call_soon_threadsafe(action))


@contextlib.contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, so that one identity is never used by two agents."""
    with (folder / LOCK_FILE).open("a") as file:
        try:
            _lock(file.fileno())
        except OSError as error:
            raise ConfigError(f"an agent already runs with {folder}") from error
        yield


def _lock(descriptor: int) -> None:
    """Lock an open file until it is closed, by kill -9 too; raises `OSError` if another process has it."""
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        return
    import fcntl

    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


# -- models and prices --------------------------------------------------------------------------------


@models_app.command("show")
def models_show(data_dir: DataDir = HOME, as_json: Json = False) -> None:
    """List the models in the settings."""
    with plain_errors():
        config = settings.load_config(data_dir)
    _print_models(config, "1m", as_json=as_json)


@models_app.command("add")
def models_add(
    name: Annotated[str, typer.Argument(help="What buyers ask for.")],
    price_in: Annotated[str, typer.Option("--input", help="Dollars per input tokens.")],
    price_out: Annotated[str, typer.Option("--output", help="Dollars per output tokens.")],
    per: Annotated[str, typer.Option(help="Prices are per 1k or per 1m tokens.")] = "1m",
    attach: Annotated[
        str, typer.Option(help="Address of a server you run, such as http://127.0.0.1:8000.")
    ] = "",
    api_key: Annotated[str, typer.Option(envvar="TOLLWAY_NODE_ENGINE_KEY", help="That server's key.")] = "",
    recipe: Annotated[
        str, typer.Option(help="Let the agent start an engine: vllm, vllm-cpu or llama-cpp.")
    ] = "",
    model_path: Annotated[str, typer.Option(help="The model's folder, or GGUF file, for a recipe.")] = "",
    python: Annotated[str, typer.Option(help="The engine environment's Python, for vllm-cpu.")] = "",
    context: Annotated[int, typer.Option(help="Longest prompt and answer together, in tokens.")] = 2048,
    capacity: Annotated[int, typer.Option(help="Requests at once.")] = 16,
    engine_name: Annotated[str, typer.Option(help="The model's name in the engine, if another.")] = "",
    tokenizer_sha256: Annotated[str, typer.Option(help="Digest of the tokenizer.json in use.")] = "",
    data_dir: DataDir = HOME,
    as_json: Json = False,
) -> None:
    """Offer a model, from a server you run (--attach) or one the agent starts (--recipe)."""
    with plain_errors():
        model = Model(
            name=name,
            input=Decimal(format_price(parse_price(price_in, _per(per)))),
            output=Decimal(format_price(parse_price(price_out, _per(per)))),
            context=context,
            capacity=capacity,
            engine_name=engine_name,
            tokenizer_sha256=tokenizer_sha256,
        )
        engine = _engine_for(
            model, attach=attach, api_key=api_key, recipe=recipe, model_path=model_path, python=python
        )
        name = _free_name(engine.name, {other.name for other in settings.load_config(data_dir).engines})
        config = settings.add_engine(data_dir, msgspec.structs.replace(engine, name=name))
    _print_models(config, "1m", as_json=as_json)


@models_app.command("remove")
def models_remove(name: str, data_dir: DataDir = HOME, as_json: Json = False) -> None:
    """Offer a model no more, from the agent's next start; an engine that serves no other goes with it."""
    with plain_errors():
        config = settings.remove_model(data_dir, name)
    _print_models(config, "1m", as_json=as_json)


def _engine_for(
    model: Model, *, attach: str, api_key: str, recipe: str, model_path: str, python: str
) -> EngineSettings:
    slug = "".join(c if c.isalnum() else "-" for c in model.name)[:60].strip("-") or "engine"
    if bool(attach) == bool(recipe):
        raise ConfigError("give either --attach ADDRESS or --recipe vllm|vllm-cpu|llama-cpp")
    if attach:
        return EngineSettings(name=slug, kind="attach", url=attach, api_key=api_key, models=[model])
    argv = settings.RECIPES.get(recipe)
    if argv is None:
        raise ConfigError(f"no recipe {recipe!r}; choose one of {', '.join(settings.RECIPES)}")
    if not Path(model_path).exists():
        raise ConfigError(f"--model-path {model_path!r} is not there")
    if recipe == "vllm-cpu" and not Path(python).is_file():
        raise ConfigError(f"--python {python!r} is not the engine environment's Python")
    return EngineSettings(
        name=slug,
        kind="spawn",
        argv=list(argv),
        python=python,
        model_path=model_path,
        environment=settings.VLLM_CPU_ENVIRONMENT if recipe == "vllm-cpu" else {},
        models=[model],
    )


def _free_name(name: str, taken: set[str]) -> str:
    """`name`, or with the first of -2, -3 … that no engine has: `my/model` and `my-model` are two."""
    names = itertools.chain((name,), (f"{name}-{number}" for number in itertools.count(2)))
    return next(each for each in names if each not in taken)


@prices_app.command("show")
def prices_show(
    per: Annotated[str, typer.Option(help="Show per 1k or per 1m tokens.")] = "1m",
    data_dir: DataDir = HOME,
    as_json: Json = False,
) -> None:
    """List prices."""
    with plain_errors():
        config = settings.load_config(data_dir)
        unit = _per(per)
    _print_models(config, unit, as_json=as_json)


@prices_app.command("set")
def prices_set(
    model: str,
    price_in: Annotated[str | None, typer.Option("--input", help="Dollars per input tokens.")] = None,
    price_out: Annotated[str | None, typer.Option("--output", help="Dollars per output tokens.")] = None,
    per: Annotated[str, typer.Option(help="The prices given are per 1k or per 1m tokens.")] = "1m",
    data_dir: DataDir = HOME,
    as_json: Json = False,
) -> None:
    """Change a model's price; a running agent takes it over within seconds."""
    with plain_errors():
        if price_in is None and price_out is None:
            raise PriceError("give --input, --output or both")
        unit = _per(per)
        config = settings.set_price(data_dir, model, price_in=price_in, price_out=price_out, per=unit)
    _print_models(config, unit, as_json=as_json)


def _per(text: str) -> Per:
    for unit in get_args(Per):
        if text.lower() == unit:
            return unit  # type: ignore[no-any-return]  # get_args loses the literal's type
    raise PriceError(f"--per is 1k or 1m, not {text!r}")


def _print_models(config: settings.Config, per: Per, *, as_json: bool) -> None:
    if as_json:
        models = [
            {
                "model": model.name,
                "engine": engine.name,
                "kind": engine.kind,
                "context": model.context,
                "capacity": model.capacity,
                "per": per,
                "input": format_price(model.price_in, per),
                "output": format_price(model.price_out, per),
                "input_nano_per_million": model.price_in,
                "output_nano_per_million": model.price_out,
            }
            for engine, model in config.models()
        ]
        print_json({"node_id": config.node_id, "models": models})
        return
    rows = [
        (
            model.name,
            f"{engine.name} ({engine.kind})",
            str(model.context),
            str(model.capacity),
            format_price(model.price_in, per),
            format_price(model.price_out, per),
        )
        for engine, model in config.models()
    ]
    print_table(("model", "engine", "context", "capacity", f"$ in / {per}", f"$ out / {per}"), rows)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
