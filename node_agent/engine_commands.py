"""`tollway-node engine install`: vLLM for this machine."""

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from node_agent.engine_recipe import GPU_ADVICE, RecipeError, find_recipe, has_gpu
from node_agent.terminal import HOME, DataDir, Json, out, plain_errors, print_json

engine_app = typer.Typer(help="Engines this agent can start.", no_args_is_help=True)


def add_to(app: typer.Typer) -> None:
    """Put these commands into `app`."""
    app.add_typer(engine_app, name="engine")


@engine_app.command()
def install(
    folder: Annotated[
        Path | None, typer.Option("--dir", help="Where to build; default: engine in the data folder.")
    ] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="The CPU engine although there is a GPU.")] = False,
    with_models: Annotated[bool, typer.Option(help="Two small models too, to try it out.")] = False,
    data_dir: DataDir = HOME,
    as_json: Json = False,
) -> None:
    """Build vLLM for CPUs in an environment of its own (2.4 GB); with a GPU, say how to get vLLM."""
    if has_gpu() and not cpu:
        if as_json:
            print_json({"kind": "gpu", "is_installed": False, "commands": list(GPU_ADVICE)})
            return
        out.print("This machine has a GPU; vLLM itself serves it best:")
        for line in GPU_ADVICE:
            out.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)
        return
    with plain_errors():
        target = (folder or data_dir / "engine").resolve()
        recipe = find_recipe()
        command = [sys.executable, str(recipe), "--dir", str(target)]
        done = subprocess.run(  # noqa: S603 - our own recipe
            command + ([] if with_models else ["--without-models"]),
            stdout=sys.stderr if as_json else None,
            check=False,
        )
        if done.returncode != 0:
            raise RecipeError(f"The recipe failed with status {done.returncode}; see {target / 'build.log'}")
    python = target / "venv" / "bin" / "python"
    offer = (
        f"tollway-node models add MODEL --recipe vllm-cpu --python {python} --model-path FOLDER "
        "--input … --output … --context …"
    )
    if as_json:
        print_json({"kind": "cpu", "is_installed": True, "python": str(python), "commands": [offer]})
        return
    out.print("Installed. Offer a model with it:")
    out.print(f"  {offer}", markup=False, highlight=False, soft_wrap=True)
