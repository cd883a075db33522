"""`doctor`: what specbasis finds where it runs, and what of it cannot work."""

from __future__ import annotations

import getpass
import os
import re
import shutil
import sys
import tempfile
import threading
from contextlib import suppress
from importlib import import_module, metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import typer

from specbasis.cli.common import STDERR, document, line
from specbasis.cli.flags import JSON
from specbasis.core.errors import told
from specbasis.core.extras import PURPOSES, command, requirements
from specbasis.core.grammar import human_bytes
from specbasis.core.text import number_of

PATIENCE = 4.0
"""Seconds that the Hub has for an answer."""

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
"""Variables that limit the threads of a product of matrices."""


def doctor(json: JSON = False) -> None:
    """Print versions, extras, devices, threads, memory, disks and the Hub as specbasis finds them.

    Paths and names of users are left out, so that it can go into an issue. Exit codes: 0; 1 if something cannot
    work, as the last lines say.
    """
    problems: list[str] = []
    report: dict[str, dict[str, Any]] = {
        "versions": _versions(problems),
        "extras": _extras(problems),
        "devices": _devices(),
        "linear algebra": _threads(),
        "memory and disks": _room(problems),
        "hub": _hub(problems),
        "terminal": {"encoding": sys.stdout.encoding, "is a terminal": sys.stdout.isatty()},
    }
    report, problems = _anonymous(report), _anonymous(problems)
    if json:
        document({**report, "problems": problems})
    else:
        for title, section in report.items():
            line(title, style="bold")
            for name, about in section.items():
                line(f"  {name}: { ({True: 'yes', False: 'no'}[about] if isinstance(about, bool) else about) }")
    for problem in problems:
        line(f"problem: {problem}", console=STDERR, style="red")
    if problems:
        raise typer.Exit(1)
    if not json:
        line("no problem found")


def _versions(problems: list[str]) -> dict[str, str]:
    """Versions and commit; what every verb needs is imported, since only that shows whether it can be."""
    from specbasis.jobs.environment import ALWAYS, WHERE_USED, environment

    for name in ALWAYS:
        try:
            import_module(name)
        except Exception as error:  # whatever a damaged library raises
            problems.append(f"{name} cannot be imported, and no verb works without it: {told(error)}")
    now = environment(WHERE_USED)
    versions = {name: version or "not installed" for name, version in now["versions"].items()}
    return {**versions, "commit": now["commit"] or "unknown", "platform": now["machine"]["platform"]}


def _extras(problems: list[str]) -> dict[str, str]:
    """For each extra what it is for, and whether all that it lists is there, in versions that it takes."""
    return {extra: f"{purpose}: {_state(extra, problems)}" for extra, purpose in PURPOSES.items()}


def _state(extra: str, problems: list[str]) -> str:
    lacking = []
    for requirement in requirements(extra):
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            lacking.append(requirement.name)
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            lacking.append(f"{requirement.name}{requirement.specifier}")
            problem = f"{requirement.name} {version} is installed; want {lacking[-1]}"
            problems += [] if problem in problems else [problem]
    return f"lacks {', '.join(lacking)}; {command(extra)}" if lacking else "installed"


def _devices() -> dict[str, str]:
    """Cores and accelerators, as loky and torch see them."""
    from loky import cpu_count

    devices = {"cores": f"{cpu_count()} for this process, {os.cpu_count()} in the machine"}
    try:
        import torch

        gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        devices["CUDA"] = "; ".join(f"{gpu.name}, {human_bytes(gpu.total_memory)}" for gpu in gpus) or "none"
        if not gpus and torch.version.cuda is None and Path("/proc/driver/nvidia").exists():
            devices["CUDA"] = "none: there is a driver of NVIDIA's, but this torch was built without CUDA"
        devices["MPS"] = "there, but without float64: not used" if torch.backends.mps.is_available() else "none"
    except Exception as error:  # whatever a driver raises
        devices["CUDA"] = f"torch cannot be asked: {told(error)}"
    return devices


def _threads() -> dict[str, str]:
    """The libraries of linear algebra that are loaded, and the variables that limit their threads."""
    from threadpoolctl import threadpool_info

    pools = {
        f"{pool['internal_api']} {pool['version'] or ''}".strip(): pool["num_threads"] for pool in threadpool_info()
    }
    with suppress(Exception):  # a torch that cannot be imported is among the problems already
        import torch

        is_mkl = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
        pools["torch, with MKL" if is_mkl else "torch"] = torch.get_num_threads()
    return {name: number_of(n, "thread") for name, n in pools.items()} | {
        v: os.environ[v] for v in THREADS if v in os.environ
    }


def _room(problems: list[str]) -> dict[str, str]:
    """What is free in memory, and on the disks where specbasis writes; their paths are left out."""
    from specbasis.jobs.engine import free_memory

    free = free_memory()
    room = {"memory": f"{human_bytes(free)} free, of which compare takes {human_bytes(free // 2)} (--memory)"}
    try:
        places = {"working folder": Path.cwd(), "temporary files": Path(tempfile.gettempdir())}
    except OSError as error:
        problems.append(
            f"the working folder is gone, or no folder for temporary files can be written: {told(error)}"
        )
        places = {}
    for name, place in {**places, "/dev/shm": Path("/dev/shm")}.items():
        if place.is_dir():
            is_writable = os.access(place, os.W_OK)
            room[name] = (
                human_bytes(shutil.disk_usage(place).free) + " free" + ("" if is_writable else ", not writable")
            )
    return room


def _hub(problems: list[str]) -> dict[str, Any]:
    """Endpoint, token, switch and answer of the Hub; nothing of the token is read but that it is there."""
    try:
        from huggingface_hub import constants, get_token
    except ImportError:
        return {"client": "not installed: see the extra hub"}
    address = urlsplit(constants.ENDPOINT)
    place = f"{address.scheme}://{address.hostname}" + (f":{address.port}" if address.port else "")
    about = {"endpoint": place, "token": get_token() is not None, "HF_HUB_OFFLINE": bool(constants.HF_HUB_OFFLINE)}
    if constants.HF_HUB_OFFLINE:
        return about
    answers: list[str] = []
    # A name server that does not answer keeps to no timeout of the client's.
    asking = threading.Thread(target=lambda: answers.append(_asked(constants.ENDPOINT)), daemon=True)
    asking.start()
    asking.join(PATIENCE)
    reason = answers[0] if answers else f"no answer within {PATIENCE:g} s"
    if reason:
        named = " at the address that HF_ENDPOINT names" if "HF_ENDPOINT" in os.environ else ""
        problems.append(
            f"the Hub cannot be reached{named} ({reason}): set HF_HUB_OFFLINE=1 where that is meant to be so"
        )
    return {**about, "reachable": not reason}


def _asked(endpoint: str) -> str:
    """Why the Hub gives no answer; empty where it gives one, whatever that is."""
    from huggingface_hub.utils import get_session

    try:
        get_session().head(endpoint, timeout=PATIENCE)
    except Exception as error:  # of the client's network library, which is another in each of its versions
        return type(error).__name__
    return ""


def _anonymous(value: Any) -> Any:
    """Without the home folder and the name of the user, wherever they stand."""
    if isinstance(value, dict):
        return {name: _anonymous(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_anonymous(inner) for inner in value]
    if not isinstance(value, str):
        return value
    with suppress(RuntimeError, KeyError, OSError):  # a container's user may have neither home nor name
        home, user = re.escape(str(Path.home()).rstrip("/")) or "(?!)", re.escape(getpass.getuser())
        # A shell takes ~ for the home folder in front of a quotation mark, not behind it.
        value = re.sub(rf"{home}(?=[/\\\s]|$)", "~", re.sub(rf'"{home}[/\\]', '~/"', value))
        value = re.sub(rf"(?<=[/\\]){user}(?=[/\\]|$)", "USER", value)
    return value
