"""What keeps this machine from earning, found before a buyer does; each finding says what to do.

Every check is independent: one that cannot run is a finding, never a crash.
"""

import asyncio
import email.utils
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import Final, Literal

import aiohttp
import msgspec

from node_agent import fabric_link, protocol
from node_agent.config import Config, ConfigError, EngineSettings, Model, load_config
from node_agent.engines import EngineError
from node_agent.engines.openai_stream import OpenAIClient
from node_agent.fabric_link import FabricRefusedError
from node_agent.identity import Identity, IdentityError, load_identity
from node_agent.service import LocalStatus
from node_agent.tokenizer_digest import NoTokenizerError, digest_of

State = Literal["ok", "warning", "failed"]
ENROLL_FIRST: Final = "Enrol this machine: tollway-node enroll TOKEN --api URL"
SECONDS_MAX: Final = 10.0
WARM_UP_SECONDS_MAX: Final = 60.0
SKEW_SECONDS_WARNING: Final = 5
SKEW_SECONDS_MAX: Final = protocol.PROOF_SKEW_MS_MAX // 1000
DISK_BYTES_MIN: Final = 200 * 1024 * 1024
DISK_BYTES_WARNING: Final = 2 * 1024**3
FILES_PER_REQUEST: Final = 2
FILES_SPARE: Final = 128
ANSWER_BYTES_MAX: Final = 256 * 1024


class Finding(msgspec.Struct, frozen=True):
    """One check's outcome; `advice` is what to do, empty when all is well."""

    check: str
    state: State
    detail: str
    advice: str = ""


def is_healthy(findings: Sequence[Finding]) -> bool:
    """True unless something failed; warnings let a node work."""
    return all(finding.state != "failed" for finding in findings)


async def examine(folder: Path, running: LocalStatus | None) -> list[Finding]:
    """Run every check for the agent of `folder`; `running` is what a running one says of itself."""
    findings = [_python(), *_disk(folder)]
    try:
        config = load_config(folder)
        findings.append(Finding("settings", "ok", f"{len(config.models())} models"))
    except ConfigError as error:
        return [*findings, Finding("settings", "failed", str(error), ENROLL_FIRST), await _gpu()]
    identity = _identity(folder, findings)
    checks: list[Awaitable[list[Finding]]] = [_marketplace(config), _fabric(config, identity, running)]
    checks += [_engine(settings, running) for settings in config.engines]
    for found in await asyncio.gather(*checks):
        findings += found
    if not config.engines:
        advice = "Offer a model: tollway-node models add NAME --attach URL --input … --output …"
        findings.append(Finding("models", "failed", "no model is offered", advice))
    return [*findings, _open_files(config), await _gpu()]


# -- this machine -------------------------------------------------------------------------------------


def _python() -> Finding:
    detail = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    return Finding("python", "ok", detail)


def _disk(folder: Path) -> list[Finding]:
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    free = shutil.disk_usage(place).free
    detail = f"{free / 1e9:.1f} GB free under {place}"
    if free < DISK_BYTES_MIN:
        return [Finding("disk", "failed", detail, "Free some: settings, journal and engine logs live there.")]
    if free < DISK_BYTES_WARNING:
        return [Finding("disk", "warning", detail, "Free some before engine logs fill it.")]
    if not os.access(place, os.W_OK):
        return [Finding("disk", "failed", f"{place} cannot be written", "Use another --data-dir.")]
    return [Finding("disk", "ok", detail)]


def _open_files(config: Config) -> Finding:
    needed = FILES_SPARE + FILES_PER_REQUEST * sum(model.capacity for _, model in config.models())
    try:
        import resource
    except ImportError:
        return Finding("open files", "ok", "not limited on this system")
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    detail = f"{soft} allowed, {needed} may be needed"
    if soft != resource.RLIM_INFINITY and soft < needed:
        return Finding("open files", "warning", detail, f"Raise it: ulimit -n {needed}, or lower capacity.")
    return Finding("open files", "ok", detail)


async def _gpu() -> Finding:
    nvidia = shutil.which("nvidia-smi")
    if nvidia is not None:
        query = "--query-gpu=name,memory.total,memory.used,driver_version"
        told = await asyncio.to_thread(_told_by, [nvidia, query, "--format=csv,noheader"])
        if told is None:
            advice = "Run nvidia-smi; mend the driver."
            return Finding("gpu", "failed", "nvidia-smi is there and fails", advice)
        return Finding("gpu", "ok", "; ".join(told.splitlines()))
    if shutil.which("rocm-smi") is not None or shutil.which("amd-smi") is not None:
        return Finding("gpu", "ok", "an AMD GPU's tools are installed")
    if sys.platform == "darwin" and platform.machine() == "arm64":
        return Finding("gpu", "ok", "Apple silicon")
    advice = "Engines on a CPU work and are slow; see: tollway-node engine install"
    return Finding("gpu", "warning", "no GPU found", advice)


def _told_by(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS_MAX, check=False)  # noqa: S603 - a fixed command
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 and done.stdout.strip() else None


def _identity(folder: Path, findings: list[Finding]) -> Identity | None:
    try:
        identity = load_identity(folder)
    except IdentityError as error:
        findings.append(Finding("key", "failed", str(error), ENROLL_FIRST))
        return None
    findings.append(Finding("key", "ok", identity.public_key))
    return identity


# -- the marketplace ----------------------------------------------------------------------------------


async def _marketplace(config: Config) -> list[Finding]:
    """Whether its API answers, how far our clock is off, and whether our tokenizers are its own."""
    try:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=SECONDS_MAX)) as session:
            began = time.monotonic()
            async with session.get(
                f"{config.api.rstrip('/')}/healthz", allow_redirects=False, raise_for_status=True
            ) as response:
                took_ms = int((time.monotonic() - began) * 1000)
                date = response.headers.get("Date", "")
            found = [Finding("marketplace", "ok", f"{config.api} answers in {took_ms} ms"), _clock(date)]
            for settings, model in config.models():
                found.append(await _tokenizer(session, config.api, settings, model))
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
        advice = "Check the network, a firewall or proxy for outgoing HTTPS, and `api` in the settings."
        detail = f"{config.api} does not answer ({str(error) or type(error).__name__})"
        return [Finding("marketplace", "failed", detail, advice)]
    return found


def _clock(date: str) -> Finding:
    try:
        theirs = email.utils.parsedate_to_datetime(date).timestamp()
    except (TypeError, ValueError):
        return Finding("clock", "warning", "the marketplace tells no time", "Compare this clock by hand.")
    skew = round(abs(time.time() - theirs))
    advice = "Switch on time synchronisation (timedatectl set-ntp true; Windows: w32tm /resync)."
    detail = f"{skew} s off the marketplace's, {SKEW_SECONDS_MAX} s are allowed"
    if skew > SKEW_SECONDS_MAX:
        return Finding("clock", "failed", detail, advice)
    if skew > SKEW_SECONDS_WARNING:
        return Finding("clock", "warning", detail, advice)
    return Finding("clock", "ok", detail)


async def _tokenizer(
    session: aiohttp.ClientSession, api: str, settings: EngineSettings, model: Model
) -> Finding:
    check = f"tokenizer of {model.name}"
    async with session.get(
        f"{api.rstrip('/')}/api/nodes/requirements", params={"model": model.name}, allow_redirects=False
    ) as response:
        body = await response.content.read(ANSWER_BYTES_MAX)
        if response.status == 404:
            advice = "Ask the marketplace to list it, or check the name for a typing error."
            return Finding(check, "failed", "the marketplace does not sell this model", advice)
    try:
        theirs: str = msgspec.json.decode(body)["tokenizer_sha256"]
    except (*protocol.NOT_DECODED, KeyError, TypeError):
        return Finding(check, "warning", "the marketplace does not tell its digest")
    ours, where = model.tokenizer_sha256, "tokenizer_sha256 in the settings"
    if settings.model_path:
        where = settings.model_path
        try:
            ours = digest_of(Path(settings.model_path))
        except NoTokenizerError as error:
            return Finding(check, "warning", str(error), "Set model_path to the model's folder.")
    if not ours:
        advice = "Set model_path of the engine to the model's folder, so that it can be compared."
        return Finding(check, "warning", "not known here", advice)
    if ours != theirs:
        advice = f"Use the model's own files: the marketplace has {theirs}, {where} gives {ours}."
        return Finding(check, "failed", "another tokenizer or chat template than the marketplace's", advice)
    return Finding(check, "ok", ours)


async def _fabric(config: Config, identity: Identity | None, running: LocalStatus | None) -> list[Finding]:
    advice = "Check the firewall for outgoing connections, and that the node is not revoked."
    if running is not None:  # a second connection as this node would cut the first
        if running.is_connected:
            return [Finding("fabric", "ok", "the running agent is connected")]
        return [
            Finding("fabric", "failed", f"the running agent has no connection to {config.nats_url}", advice)
        ]
    if identity is None:
        return []
    try:
        async with asyncio.timeout(SECONDS_MAX):
            await fabric_link.try_connection(config, identity)
    except (FabricRefusedError, ConfigError, TimeoutError) as error:
        told = str(error) or "no answer"
        if "authorization" in told.lower():
            advice = f"This node is not known there or was revoked. {ENROLL_FIRST}"
        elif "certificate" in told.lower() or "nats_ca" in told:
            advice = (
                'Name the fabric\'s authority in the settings: nats_ca = "FILE.pem"; and check the clock.'
            )
        return [Finding("fabric", "failed", f"{config.nats_url}: {told}", advice)]
    return [Finding("fabric", "ok", f"{config.nats_url} lets this node in")]


# -- engines ------------------------------------------------------------------------------------------


async def _engine(settings: EngineSettings, running: LocalStatus | None) -> list[Finding]:
    check = f"engine {settings.name}"
    if settings.kind == "spawn":
        return [_spawned(check, settings, running)]
    assert settings.url is not None
    client = OpenAIClient(settings.url, settings.api_key)
    found = []
    try:
        for model in settings.models:
            found += await _attached(check, client, model)
    except EngineError as error:
        advice = f"Start the server at {settings.url}; check its address, its key and the model's name there."
        return [Finding(check, "failed", str(error), advice)]
    except TimeoutError:
        return [Finding(check, "failed", "a generation of four tokens takes too long", "Look at its log.")]
    finally:
        await client.close()
    return found


async def _attached(check: str, client: OpenAIClient, model: Model) -> list[Finding]:
    context = await client.context(model.name_in_engine)
    began = time.monotonic()
    async with asyncio.timeout(WARM_UP_SECONDS_MAX):
        await client.warm_up(model.name_in_engine)
    took_ms = int((time.monotonic() - began) * 1000)
    found = [Finding(check, "ok", f"{model.name} generates; four tokens took {took_ms} ms")]
    if context is not None and context < model.context:
        advice = f"Set context = {context} for {model.name}, or start the engine with a longer one."
        detail = f"{model.name} offers {model.context} tokens, the engine takes {context}"
        found.append(Finding(check, "failed", detail, advice))
    if not client.tells_token_ids:
        advice = "vLLM tells them; without, the marketplace bills its own count of the text."
        found.append(Finding(check, "warning", f"{model.name} comes without token ids", advice))
    return found


def _spawned(check: str, settings: EngineSettings, running: LocalStatus | None) -> Finding:
    program = settings.argv[0].replace("{python}", settings.python)
    if shutil.which(program) is None:
        advice = "Install it (tollway-node engine install), or correct argv in the settings."
        return Finding(check, "failed", f"{program!r} is not a program here", advice)
    if settings.model_path and not Path(settings.model_path).exists():
        return Finding(check, "failed", f"{settings.model_path} is not there", "Correct model_path.")
    view = next((view for view in running.engines if view.name == settings.name), None) if running else None
    if view is None:
        return Finding(check, "ok", f"{program} is there; the agent starts it")
    if view.state == "ready":
        return Finding(check, "ok", f"ready, {view.restarts} restarts")
    if view.state == "starting":
        return Finding(check, "warning", "is starting", "Wait; a large model takes minutes.")
    return Finding(
        check, "failed", view.last_error or view.state, f"Look at its log: engines/{settings.name}.log"
    )
