"""`tollway-node service install|uninstall|status|show`."""

import getpass
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Final

import typer

from node_agent import config as settings
from node_agent.config import ConfigError
from node_agent.identity import load_identity
from node_agent.machine_service import Kind, Plan, ServiceError, Wanted, kind_of, plan, spoken
from node_agent.terminal import HOME, DataDir, Json, out, plain_errors, print_json

COMMAND_SECONDS_MAX: Final = 120

service_app = typer.Typer(help="Let the agent start with the machine.", no_args_is_help=True)
System = Annotated[bool, typer.Option("--system", help="For the whole machine; needs its administrator.")]
ForKind = Annotated[str, typer.Option("--kind", help="systemd, launchd or windows, if not this machine's.")]


def add_to(app: typer.Typer) -> None:
    """Put these commands into `app`."""
    app.add_typer(service_app, name="service")


def _plan(data_dir: Path, *, is_system: bool, kind: str = "") -> Plan:
    with plain_errors():
        drain_seconds = settings.load_config(data_dir).drain_seconds
        load_identity(data_dir)
        wanted = Wanted(
            python=Path(sys.executable),
            data_dir=data_dir.resolve(),
            drain_seconds=drain_seconds,
            home=Path.home(),
            user=getpass.getuser(),
            is_system=is_system,
        )
        return plan(_kind(kind), wanted)
    raise AssertionError("plain_errors ends the command")


def _kind(text: str) -> Kind:
    known: tuple[Kind, ...] = ("systemd", "launchd", "windows")
    if not text:
        return kind_of(sys.platform)
    found = next((kind for kind in known if kind == text), None)
    if found is None:
        raise ConfigError(f"--kind is systemd, launchd or windows, not {text!r}")
    return found


@service_app.command()
def show(data_dir: DataDir = HOME, system: System = False, kind: ForKind = "", as_json: Json = False) -> None:
    """Print the file and the commands that `install` would use; changes nothing."""
    made = _plan(data_dir, is_system=system, kind=kind)
    if as_json:
        commands = {"install": spoken(made.install), "uninstall": spoken(made.uninstall)}
        print_json({"kind": made.kind, "path": str(made.path), "content": made.content, **commands})
        return
    sys.stdout.write(made.content)
    out.print(f"goes to {made.path}; then:", markup=False, highlight=False)
    for line in spoken(made.install):
        out.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)


@service_app.command()
def install(data_dir: DataDir = HOME, system: System = False, as_json: Json = False) -> None:
    """Write the service file, switch it on and start it."""
    made = _plan(data_dir, is_system=system)
    path = Path(made.path)
    with plain_errors():
        path.parent.mkdir(parents=True, exist_ok=True)
        # The task scheduler reads UTF-16, the others UTF-8; none of them needs it to be secret.
        path.write_text(made.content, encoding="utf-16" if made.kind == "windows" else "utf-8")
        for command in made.install:
            _run(command, f"The file is in {path}. Try by hand: {spoken([command])[0]}")
    if as_json:
        print_json({"kind": made.kind, "path": str(path), "is_installed": True})
    else:
        out.print(f"Installed as {path}; it runs now and starts with the machine.", markup=False)


@service_app.command()
def uninstall(data_dir: DataDir = HOME, system: System = False, as_json: Json = False) -> None:
    """Stop the service, which finishes running requests first, and remove its file."""
    made = _plan(data_dir, is_system=system)
    for command in made.uninstall:
        _run(command, "", may_fail=True)
    with plain_errors():
        Path(made.path).unlink(missing_ok=True)
    if as_json:
        print_json({"kind": made.kind, "path": str(made.path), "is_installed": False})
    else:
        out.print(f"Removed {made.path}.", markup=False)


@service_app.command()
def status(data_dir: DataDir = HOME, system: System = False, as_json: Json = False) -> None:
    """Tell whether the service is installed and running; exit status 1 if not."""
    made = _plan(data_dir, is_system=system)
    is_installed = Path(made.path).exists()
    is_running = is_installed and _run(made.status, "", may_fail=True)
    if as_json:
        print_json(
            {
                "kind": made.kind,
                "path": str(made.path),
                "is_installed": is_installed,
                "is_running": is_running,
            }
        )
    elif not is_installed:
        out.print("Not installed: tollway-node service install")
    else:
        out.print(f"{made.path}: {'running' if is_running else 'installed, not running'}", markup=False)
    if not is_running:
        raise typer.Exit(1)


def _run(command: Sequence[str], advice: str, *, may_fail: bool = False) -> bool:
    """Run a command of the system; a failure ends ours with its own words, unless it may fail."""
    environment = os.environ | {"SYSTEMD_PAGER": ""}
    try:
        done = subprocess.run(  # noqa: S603 - fixed commands
            command,
            capture_output=True,
            text=True,
            timeout=COMMAND_SECONDS_MAX,
            check=False,
            env=environment,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        if may_fail:
            return False
        raise ServiceError(f"{command[0]} cannot be run ({error}). {advice}") from error
    if done.returncode == 0 or may_fail:
        return done.returncode == 0
    told = " ".join((done.stderr or done.stdout).split()) or f"status {done.returncode}"
    raise ServiceError(f"{command[0]}: {told}. {advice}")
