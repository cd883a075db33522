"""Run independent jobs side by side: threads, worker processes, or a Ray cluster; one loop for all of them.

Every job runs on one BLAS thread, so its result is the same bit for bit whatever runs beside it and wherever.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

from threadpoolctl import threadpool_limits

from specbasis.core.errors import InputError
from specbasis.core.extras import require
from specbasis.core.options import check_choice
from specbasis.jobs.progress import Progress, Report, silent

ENGINES = ("auto", "threads", "processes", "ray")

SMALL_WORK = 3e12
"""Below so many flops (about a minute) the work is done by threads: starting processes would take a share of it."""

ATTEMPTS = 4
"""How often a job is tried whose worker dies."""


@runtime_checkable
class Job(Protocol):
    """What an engine needs to know of a piece of work. It is pickled: it holds names and places, not tensors."""

    @property
    def name(self) -> str:
        """What to call it in an error."""

    @property
    def flops(self) -> float:
        """Predicted work; longer jobs start earlier."""

    @property
    def bytes(self) -> int:
        """Predicted peak memory."""

    def run(self) -> Any:
        """Do it."""


T = TypeVar("T", bound=Job)
Submit = Callable[[Job], "Future[Any]"]


def run(
    jobs: Sequence[T],
    *,
    workers: int,
    memory: int | None = None,
    engine: str = "auto",
    local: bool = False,
    progress: Report | None = None,
) -> Generator[tuple[T, Any], None, None]:
    """Run jobs, longest first, and yield each with its result as it ends.

    A job whose worker dies is tried again, alone, since lack of memory is the likely reason.

    Args:
        jobs: what to do.
        workers: how many run at the same time.
        memory: bytes that the running jobs together may be predicted to take; half of what is free when None. A
            job that needs more runs alone.
        engine: "threads" of this process; "processes", which survive the death of one of them; "ray", a Ray
            cluster (the running one, else one on this machine); "auto": processes for long work, else threads.
        local: the jobs cannot leave this process.
        progress: called at the start, and after each job when its result has been taken.

    Raises:
        InputError: a job's workers died `ATTEMPTS` times, or the engine is unknown or not installed.
    """
    check_choice("engine", engine, ENGINES)
    small = sum(job.flops for job in jobs) < SMALL_WORK
    if engine == "auto":
        alone = local or workers == 1 or len(jobs) < 2 or small or not _processes_can_wait()
        engine = "threads" if alone else "processes"
    if local and engine != "threads":
        raise InputError(f"tensors in memory cannot reach engine {engine!r}; write them to a file, or use threads")
    memory = free_memory() // 2 if memory is None else memory
    start = {"threads": _threads, "processes": _processes, "ray": _ray}[engine]
    waiting = sorted(jobs, key=lambda job: -job.flops)
    died: Counter[int] = Counter()
    report, done, total = progress or silent, 0.0, math.fsum(job.flops for job in jobs)
    report(Progress(done, total, jobs[0].name if jobs else ""))
    while waiting:
        with start(max(1, min(workers, len(waiting)))) as submit:
            for job, result in _until_a_death(waiting, submit, workers, memory, died):
                yield job, result
                done += job.flops
                report(Progress(done, total, job.name))


def _until_a_death(
    waiting: list[T], submit: Submit, workers: int, memory: int, died: Counter[int]
) -> Iterator[tuple[T, Any]]:
    """Run until nothing is waiting, or until workers die: then the jobs that they had are waiting again, first."""
    running: dict[Future[Any], T] = {}
    while waiting or running:
        used = sum(job.bytes for job in running.values())
        for job in list(waiting):
            alone = bool(died[id(job)]) or any(died[id(other)] for other in running.values())
            if running and (len(running) >= workers or alone or used + job.bytes > memory):
                continue
            waiting.remove(job)
            used += job.bytes
            running[submit(job)] = job
        lost: list[T] = []
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            job = running.pop(future)
            try:
                result = future.result()
            except _deaths() as error:
                lost.append(job)
                died[id(job)] += 1
                if died[id(job)] >= ATTEMPTS:
                    raise InputError(
                        f"{job.name}: its worker died {ATTEMPTS} times, perhaps for lack of memory (predicted: "
                        f"{job.bytes / 2**30:.1f} GiB); what is done is kept: run again where there is more"
                    ) from error
            else:
                yield job, result
        if lost:
            waiting[:0] = [*lost, *running.values()]
            for job in running.values():
                died[id(job)] += 1
            return


@contextmanager
def _threads(workers: int) -> Iterator[Submit]:
    import torch

    threads = torch.get_num_threads()
    executor = ThreadPoolExecutor(workers, "specbasis", initializer=torch.set_num_threads, initargs=(1,))
    try:
        with threadpool_limits(1, user_api="blas"):  # scipy's BLAS is not torch's
            yield lambda job: executor.submit(job.run)
    finally:
        executor.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # BLAS libraries hold this number for the whole process


def _processes_can_wait() -> bool:
    """Whether processes can wait for each other: the system's semaphores need a /dev/shm that can be written."""
    try:
        multiprocessing.Lock()
    except (OSError, ImportError):
        return False
    return True


@contextmanager
def _processes(workers: int) -> Iterator[Submit]:
    from loky import ProcessPoolExecutor

    if not _processes_can_wait():
        raise InputError("engine 'processes' needs a /dev/shm that can be written; want 'auto' or 'threads'")
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    # loky takes mapped pages of weights for a leak, and would restart workers with a warning.
    env = {**one_thread, "LOKY_MAX_MEMORY_LEAK_SIZE": "1e18"}
    executor = ProcessPoolExecutor(workers, initializer=_leave_with, initargs=(os.getpid(),), env=env)
    try:
        yield lambda job: executor.submit(_run, job)
    finally:
        executor.shutdown(kill_workers=True)


@contextmanager
def _ray(workers: int) -> Iterator[Submit]:
    ray = require("ray", purpose="engine 'ray' needs")
    own = not ray.is_initialized()
    if own:
        _connect(ray, workers)
    # Ray tries a job again by itself where its worker or node is lost, and leaves the other jobs alone.
    remote = ray.remote(max_retries=ATTEMPTS - 1, num_cpus=1)(_run)
    try:
        yield lambda job: remote.options(name=job.name).remote(job).future()
    finally:
        if own:
            ray.shutdown()


def _connect(ray: Any, workers: int) -> None:
    """Join the cluster that RAY_ADDRESS names, or that runs here; start one on this machine where there is none."""
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        ray.init(address=os.environ.get("RAY_ADDRESS", "auto"), **quiet)
    except ConnectionError:
        ray.init(num_cpus=workers, include_dashboard=False, **quiet)


def _deaths() -> tuple[type[BaseException], ...]:
    """What a future raises when its worker is no more."""
    ray = sys.modules.get("ray")
    if ray is None:
        return (BrokenProcessPool,)
    names = (
        "WorkerCrashedError",
        "NodeDiedError",
        "LocalRayletDiedError",
        "OutOfMemoryError",
        "ObjectLostError",
        "NodePreemptedError",
    )
    return (BrokenProcessPool, *(getattr(ray.exceptions, name) for name in names if hasattr(ray.exceptions, name)))


def _leave_with(driver: int) -> None:
    """End this worker when its driver is gone: one that is killed outright cannot end its workers itself."""

    def watch() -> None:
        while os.getppid() == driver:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _run(job: Job) -> Any:
    """In a worker process: one thread, whatever the process was started with."""
    import torch

    torch.set_num_threads(1)
    with threadpool_limits(1, user_api="blas"):
        return job.run()


def free_memory() -> int:
    """Bytes that this process may still take: what the machine has available, or its control group leaves."""
    limit, current = (_number(Path("/sys/fs/cgroup") / f"memory.{name}") for name in ("max", "current"))
    available = _available()
    return available if limit is None or current is None else max(0, min(available, limit - current))


def _available() -> int:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux: half of what is installed
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2 if hasattr(os, "sysconf") else 2**32


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):  # no control groups here, or "max"
        return None
