"""`tollway serve --workers N`: several gateway processes on one socket, replaced one by one.

The owner binds the socket once and hands it to every worker, so connections wait in one row that outlives any
of them.  SIGHUP replaces the workers one after the other: the new one takes connections before the old one is
told to stop, and a stopping worker answers what is under way and what still arrives on its connections
(`hot_route.HotRouteProtocol.shutdown`).  New workers start from the files on disk, so this is also how a new
release begins.  A worker that dies is started again, later each time it dies young.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import structlog
from prometheus_client import multiprocess

from marketplace.platform.processes import die_with_parent

WORKERS_MAX: Final = 64
"""The ledger's lanes, of which each worker holds one."""
READY_S_MAX: Final = 60.0
STOP_S_MAX: Final = 60.0
"""Longer than a worker lets its streams finish."""
YOUNG_S: Final = 10.0
PAUSE_S_MAX: Final = 30.0
BACKLOG: Final = 2048
METRICS_FOLDER: Final = "PROMETHEUS_MULTIPROC_DIR"

_log = structlog.get_logger()


def bind(host: str, port: int) -> socket.socket:
    """Give the socket that all workers accept on, listening."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((host, port))
    listener.listen(BACKLOG)
    listener.set_inheritable(True)
    return listener


class Worker:
    """One gateway process."""

    def __init__(self, process: asyncio.subprocess.Process, started: float) -> None:
        self.process = process
        self.started = started

    @property
    def is_alive(self) -> bool:
        return self.process.returncode is None

    async def stop(self) -> None:
        """Let it finish what it has; kill it if it does not."""
        if not self.is_alive:
            return
        self.process.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(self.process.wait(), STOP_S_MAX)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            await self.process.wait()


class Workers:
    """Keeps `count` workers running; `argv` starts one, given `--listen-fd` and `--ready-fd`."""

    def __init__(self, argv: Sequence[str], listener: socket.socket, count: int, metrics: Path) -> None:
        self._argv = tuple(argv)
        self._listener = listener
        self._metrics = metrics
        self._slots: list[Worker | None] = [None] * count
        self._replacing = asyncio.Lock()
        self._stopping = asyncio.Event()

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT; SIGHUP replaces the workers."""
        loop = asyncio.get_running_loop()
        tasks: set[asyncio.Task[None]] = set()

        def replace() -> None:
            task = asyncio.create_task(self.replace())
            tasks.add(task)
            task.add_done_callback(tasks.discard)

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stopping.set)
        loop.add_signal_handler(signal.SIGHUP, replace)
        keeping = [asyncio.create_task(self._keep(slot)) for slot in range(len(self._slots))]
        await self._stopping.wait()
        for task in (*keeping, *tasks):
            task.cancel()
        await asyncio.gather(*keeping, *tasks, return_exceptions=True)
        self._listener.close()
        await asyncio.gather(*(worker.stop() for worker in self._slots if worker is not None))

    async def replace(self) -> None:
        """Put a new worker in every slot, each ready before the old one is told to stop."""
        async with self._replacing:
            for slot, old in enumerate(self._slots):
                new = await self._start()
                if new is None:
                    _log.error("a new worker did not start; the old ones go on", slot=slot)
                    return
                self._slots[slot] = new
                if old is not None:
                    await old.stop()
                    self._buried(old)
        _log.info("all workers replaced", workers=len(self._slots))

    async def _keep(self, slot: int) -> None:
        """Have a worker in this slot, whatever becomes of the last one."""
        pause_s = 1.0
        while True:
            worker = self._slots[slot]
            if worker is None:
                worker = self._slots[slot] = await self._start()
            if worker is not None:
                await worker.process.wait()
            if self._slots[slot] is not worker:
                continue  # it was replaced
            self._slots[slot] = None
            if worker is not None:
                self._buried(worker)
                _log.error("a worker died", pid=worker.process.pid, status=worker.process.returncode)
                age_s = asyncio.get_running_loop().time() - worker.started
                pause_s = 1.0 if age_s > YOUNG_S else pause_s
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, PAUSE_S_MAX)

    async def _start(self) -> Worker | None:
        """Start a worker and wait until it accepts; None if it does not come up."""
        ours, theirs = os.pipe()
        listen = self._listener.fileno()
        try:
            process = await asyncio.create_subprocess_exec(
                *self._argv, "--listen-fd", str(listen), "--ready-fd", str(theirs),
                pass_fds=(listen, theirs),
                start_new_session=True,
                preexec_fn=die_with_parent(signal.SIGTERM),
                env={**os.environ, METRICS_FOLDER: str(self._metrics)},
            )  # fmt: skip
        finally:
            os.close(theirs)
        worker = Worker(process, asyncio.get_running_loop().time())
        try:
            is_ready = await _readable(ours)
        except asyncio.CancelledError:
            await worker.stop()
            raise
        finally:
            os.close(ours)
        if not is_ready:
            await worker.stop()
            return None
        _log.info("a worker serves", pid=process.pid)
        return worker

    def _buried(self, worker: Worker) -> None:
        forget: Callable[[int, str], None] = multiprocess.mark_process_dead
        forget(worker.process.pid, str(self._metrics))


async def _readable(pipe: int) -> bool:
    """Tell whether a byte comes down the pipe in time; its end closes when the worker dies."""
    loop = asyncio.get_running_loop()
    came = asyncio.Event()
    loop.add_reader(pipe, came.set)
    try:
        await asyncio.wait_for(came.wait(), READY_S_MAX)
        return os.read(pipe, 1) == b"1"
    except TimeoutError:
        return False
    finally:
        loop.remove_reader(pipe)


async def run_workers(argv: Sequence[str], *, host: str, port: int, count: int) -> None:
    """Bind and keep `count` workers until told to stop."""
    metrics = Path(tempfile.mkdtemp(prefix="tollway-metrics-"))
    listener = bind(host, port)
    try:
        _log.info("workers are starting", host=host, port=listener.getsockname()[1], workers=count)
        await Workers(argv, listener, count, metrics).run()
    finally:
        listener.close()
        shutil.rmtree(metrics, ignore_errors=True)
