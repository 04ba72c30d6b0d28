"""`tollway-node config init|check|path`."""

from typing import Annotated

import typer

from node_agent import config as settings
from node_agent.config import CONFIG_FILE, ConfigError
from node_agent.terminal import HOME, DataDir, Json, out, plain_errors, print_json

config_app = typer.Typer(help="The settings file, with comments.", no_args_is_help=True)


def add_to(app: typer.Typer) -> None:
    """Put these commands into `app`."""
    app.add_typer(config_app, name="config")


@config_app.command()
def init(
    node_id: Annotated[str, typer.Option(help="The node's id, if known.")] = "not-enrolled",
    api: Annotated[str, typer.Option(help="The marketplace's address.")] = "https://tollway.example",
    nats_url: Annotated[str, typer.Option(help="The fabric's address.")] = "tls://nats.tollway.example:4222",
    force: Annotated[bool, typer.Option("--force", help="Replace settings that are there.")] = False,
    data_dir: DataDir = HOME,
    as_json: Json = False,
) -> None:
    """Write a settings file that explains itself; `enroll` fills in what the marketplace answers."""
    with plain_errors():
        path = data_dir / CONFIG_FILE
        if path.exists() and not force:
            raise ConfigError(f"{path} is there already; edit it, or replace it with --force")
        settings.write_settings(data_dir, node_id=node_id, api=api, nats_url=nats_url)
    if as_json:
        print_json({"path": str(path)})
    else:
        out.print(f"Written: {path}", markup=False)


@config_app.command()
def check(data_dir: DataDir = HOME, as_json: Json = False) -> None:
    """Read the settings as the agent would, and say what is wrong with them."""
    with plain_errors():
        config = settings.load_config(data_dir)
    if as_json:
        models = [model.name for _, model in config.models()]
        print_json({"path": str(data_dir / CONFIG_FILE), "is_valid": True, "models": models})
    else:
        counts = f"{len(config.engines)} engines, {len(config.models())} models"
        out.print(f"{data_dir / CONFIG_FILE} is valid: {counts}", markup=False)
