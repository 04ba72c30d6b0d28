"""Where the recipe of the CPU engine lies, and what to do where there is a GPU instead.

The recipe is `engine/build.py` of the project with its hash-pinned lock; a wheel carries it inside this
package, a source tree beside it.
"""

import platform
import shutil
import sys
from pathlib import Path
from typing import Final

_PLACES: Final = (
    Path(__file__).parent / "recipe" / "build.py",
    Path(__file__).parents[1] / "engine" / "build.py",
)
_LOCK_PYTHON: Final = (3, 11)

GPU_ADVICE: Final = (
    "python3 -m venv ~/vllm && ~/vllm/bin/pip install vllm",
    "~/vllm/bin/vllm serve MODEL --host 127.0.0.1 --port 8000 --enable-prompt-tokens-details",
    "tollway-node models add MODEL --attach http://127.0.0.1:8000 --input … --output … --context …",
)


class RecipeError(Exception):
    """The CPU engine cannot be built here; the text says why and what to do instead."""


def has_gpu() -> bool:
    """True if a GPU's own tool is on the path."""
    return any(shutil.which(tool) for tool in ("nvidia-smi", "rocm-smi", "amd-smi"))


def find_recipe() -> Path:
    """Give the recipe's path; raises `RecipeError` where it cannot work."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        raise RecipeError(
            f"vLLM for CPUs runs on Linux (x86_64, aarch64), this is {sys.platform} {platform.machine()}. "
            "Run another server, such as llama.cpp's llama-server, and attach it: "
            "tollway-node models add MODEL --attach URL …"
        )
    found = next((path for path in _PLACES if path.is_file()), None)
    if found is None:
        raise RecipeError(
            "This installation came without the recipe. Take engine/ from the project's source and run: "
            "python3 engine/build.py --without-models"
        )
    if sys.version_info[:2] != _LOCK_PYTHON:
        raise RecipeError(
            f"The recipe is pinned for Python 3.11, this is {platform.python_version()}. "
            f"Run it with that one: python3.11 {found} --without-models"
        )
    return found
