"""How busy an engine is, read leniently from its Prometheus page.

Engines rename metrics between versions and leave lines out; what cannot be read counts as zero and
never as an error. Values of several engine ranks are added, cache use takes the fullest.
"""

import math
import re
from typing import Final

import msgspec

TEXT_BYTES_MAX: Final = 4 * 1024 * 1024
_COUNT_MAX: Final = 1_000_000

_LINE: Final = re.compile(r"^([A-Za-z_:][A-Za-z0-9_:]*)(?:\{(.*)\})?\s+(\S+)(?:\s+\d+)?\s*$")
_MODEL: Final = re.compile(r'(?:^|,)\s*model_name="((?:[^"\\]|\\.)*)"')
_RUNNING: Final = frozenset(
    {"vllm:num_requests_running", "sglang:num_running_reqs", "llamacpp:requests_processing"}
)
_WAITING: Final = frozenset(
    {"vllm:num_requests_waiting", "sglang:num_queue_reqs", "llamacpp:requests_deferred"}
)
_CACHE: Final = frozenset({"vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc", "sglang:token_usage"})


class Load(msgspec.Struct, frozen=True):
    """Requests running and waiting, and the used part of the key-value cache in thousandths."""

    running: int = 0
    waiting: int = 0
    kv_used_permille: int = 0


def parse_load(text: str, model: str) -> Load:
    """Give back the load of `model` in a Prometheus page; lines without a model name count too."""
    running = waiting = permille = 0
    for line in text.splitlines():
        match = None if line.startswith("#") else _LINE.match(line)
        if match is None or not _is_about(match[2], model):
            continue
        name, value = match[1], _number(match[3])
        if name in _RUNNING:
            running += int(value)
        elif name in _WAITING:
            waiting += int(value)
        elif name in _CACHE:
            permille = max(permille, min(1000, int(value * 1000)))
    return Load(min(running, _COUNT_MAX), min(waiting, _COUNT_MAX), permille)


def _is_about(labels: str | None, model: str) -> bool:
    match = _MODEL.search(labels or "")
    return match is None or match[1] == model


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        return 0.0
    return min(value, float(_COUNT_MAX)) if math.isfinite(value) and value > 0 else 0.0
