"""Time, accuracy and memory against other tools, as one table of ratios from one run.

Every contender runs in a process of its own, on the same two checkpoints, in turns; the table gives the median over
the turns of the ratio of specbasis to the contender of the same turn, so that a machine that is slow for a while is
slow for both. `docs/performance.md` says how to read it.

    python benchmarks/speed.py --diffract-python PATH --weightwatcher-python PATH   Pythons that have the peers
    python benchmarks/speed.py --make-diffract PYTHON3.12 --make-weightwatcher PYTHON   makes them in benchmarks/
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

HERE = Path(__file__).parent
SIZES = {"bert-base": (12, 768), "minilm": (6, 384), "small": (4, 256)}

# --- what each contender does, in its own process: prints one JSON line ------------------------------------------


def specbasis(base: str, tuned: str, out: str, threads: int) -> dict[str, object]:
    """Left and right alignment and spectra of all ranks, rows and manifest written."""
    import specbasis as package

    started, cpu = time.perf_counter(), time.process_time()
    measures = ["alignment_*", "singular_value_base", "singular_value_tuned", "singular_value_change"]
    package.compare(base, tuned, out, ranks=10**6, measures=measures, workers=threads)
    return {"seconds": time.perf_counter() - started, "cpu": time.process_time() - cpu}


def svd_loop(base: str, tuned: str, out: str, threads: int) -> dict[str, object]:
    """The same numbers by torch.linalg.svd in float32."""
    import torch
    from safetensors import safe_open

    torch.set_num_threads(threads)
    started, cpu = time.perf_counter(), time.process_time()
    rows = {}
    with safe_open(base, "pt") as a, safe_open(tuned, "pt") as b:
        for name in a.keys():  # noqa: SIM118
            (Ua, Sa, Va), (Ub, Sb, Vb) = (torch.linalg.svd(c.get_tensor(name), full_matrices=False) for c in (a, b))
            rows[name] = torch.stack([(Ua * Ub).sum(0).abs(), (Va * Vb).sum(1).abs(), Sa, Sb])
    seconds = {"seconds": time.perf_counter() - started, "cpu": time.process_time() - cpu}
    torch.save(rows, out)
    return seconds


def diffract(base: str, tuned: str, out: str, threads: int) -> dict[str, object]:
    """Diffract's left and right agreement of equal ranks."""
    from diffract import Session
    from safetensors.numpy import load_file

    started, cpu = time.perf_counter(), time.process_time()
    session = Session(profile="ram")
    with session:
        session.models.add(load_file(base), model_id="base")
        session.models.add(load_file(tuned), model_id="tuned")
        session.compute.apply("l_agreement", "r_agreement")
        found = session.results.export_aggregates("l_agreement", "r_agreement", export_format="dict")
    seconds = {"seconds": time.perf_counter() - started, "cpu": time.process_time() - cpu}
    Path(out).write_text(repr(found)[:2000])
    return seconds


def delta_values(base: str, tuned: str, out: str, threads: int) -> dict[str, object]:
    """specbasis: the spectra of the deltas alone."""
    import specbasis as package

    started, cpu = time.perf_counter(), time.process_time()
    package.compare(base, tuned, out, measures=["singular_value_delta"], workers=threads)
    return {"seconds": time.perf_counter() - started, "cpu": time.process_time() - cpu}


def numpy_values(base: str, tuned: str, out: str, threads: int) -> dict[str, object]:
    """The spectra of the deltas by numpy.linalg.svd without vectors, in float32."""
    import numpy as np
    import torch
    from safetensors import safe_open

    torch.set_num_threads(threads)
    started, cpu = time.perf_counter(), time.process_time()
    with safe_open(base, "np") as a, safe_open(tuned, "np") as b:
        for name in a.keys():  # noqa: SIM118
            np.linalg.svd(b.get_tensor(name) - a.get_tensor(name), compute_uv=False)
    return {"seconds": time.perf_counter() - started, "cpu": time.process_time() - cpu}


def weightwatcher(base: str, tuned: str, out: str, threads: int) -> dict[str, object]:
    """WeightWatcher's spectra of the deltas: its layer iterator with a base model, without its power-law fits."""
    import torch
    import weightwatcher as ww
    from safetensors.torch import load_file

    torch.set_num_threads(threads)

    def model(path: str) -> torch.nn.Module:
        layers = torch.nn.ModuleDict()
        for name, W in load_file(path).items():
            layer = torch.nn.Linear(W.shape[1], W.shape[0], bias=False, device="meta")
            layer.weight = torch.nn.Parameter(W, requires_grad=False)
            layers[name.replace(".", "_")] = layer
        return layers

    started, cpu = time.perf_counter(), time.process_time()
    watcher = ww.WeightWatcher(log_level="ERROR")
    params = ww.DEFAULT_PARAMS.copy()
    spectra = {}
    for layer in watcher.make_layer_iterator(model=model(tuned), base_model=model(base), params=params):
        watcher.apply_esd(layer, params)
        spectra[layer.name] = len(layer.evals)
    if len(spectra) < len(load_file(base)):
        sys.exit(f"WeightWatcher gave {len(spectra)} spectra")
    return {"seconds": time.perf_counter() - started, "cpu": time.process_time() - cpu}


def floor(base: str, tuned: str, out: str, threads: int) -> dict[str, object]:
    """Flops at the measured rate of a product, and bytes at the measured rate of reading: nothing is faster."""
    import torch
    from safetensors import safe_open

    torch.set_num_threads(threads)
    A = torch.randn(2048, 2048, dtype=torch.float64)
    times = []
    for _ in range(6):
        started = time.perf_counter()
        A @ A
        times.append(time.perf_counter() - started)
    rate = 2 * 2048**3 / min(times)
    flops = 0.0
    with safe_open(base, "pt") as a:
        for name in a.keys():  # noqa: SIM118
            n, m = sorted(a.get_slice(name).get_shape())
            flops += 2 * (n * n * m + 6 * n**3 + 2 * n * n * m)
    started = time.perf_counter()
    size = sum(len(Path(path).read_bytes()) for path in (base, tuned))
    read = time.perf_counter() - started
    return {"seconds": flops / rate + read, "cpu": threads * (flops / rate), "rate": rate / 1e9, "bytes": size}


CONTENDERS = {
    f.__name__: f for f in (specbasis, svd_loop, diffract, delta_values, numpy_values, weightwatcher, floor)
}
PAIRS = {
    "svd_loop": "specbasis",
    "diffract": "specbasis",
    "numpy_values": "delta_values",
    "weightwatcher": "delta_values",
    "floor": "specbasis",
}

PEERS = {"diffract": "diffract-core==0.3.1", "weightwatcher": "weightwatcher==0.7.7"}
"""Tools that need an environment of their own (Diffract: Python >= 3.12)."""

# --- the run -----------------------------------------------------------------------------------------------------


def write_pair(folder: Path, blocks: int, width: int) -> tuple[Path, Path]:
    """Two float32 checkpoints with the shapes of a BERT encoder: a bulk with a few larger directions, finetuned."""
    import torch
    from safetensors.torch import save_file

    g = torch.Generator().manual_seed(0)

    def weight(rows: int, columns: int) -> torch.Tensor:
        bulk = torch.randn(rows, columns, generator=g) * 0.04
        large = torch.randn(rows, 8, generator=g) @ torch.randn(8, columns, generator=g)
        return bulk + 0.01 * large

    base = {}
    for b in range(blocks):
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            base[f"encoder.layer.{b}.attention.{part}.weight"] = weight(width, width)
        base[f"encoder.layer.{b}.intermediate.dense.weight"] = weight(4 * width, width)
        base[f"encoder.layer.{b}.output.dense.weight"] = weight(width, 4 * width)
    tuned = {name: W + 0.05 * W.std() * torch.randn(W.shape, generator=g) for name, W in base.items()}
    paths = folder / "base.safetensors", folder / "tuned.safetensors"
    for path, state in zip(paths, (base, tuned), strict=True):
        if not path.exists():
            save_file(state, path)
    return paths


def run(
    name: str, python: str, base: Path, tuned: Path, out: Path, threads: int, script: Path = Path(__file__)
) -> dict[str, float]:
    """One contender in its own process: what it printed, and the peak of the anonymous memory of its whole tree."""
    environment = os.environ | dict.fromkeys(
        ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads)
    )
    command = [python, script, "--contender", name, str(base), str(tuned), str(out), str(threads)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    peak = [0]

    def watch() -> None:
        while process.poll() is None:
            peak[0] = max(peak[0], sum(anonymous(pid) for pid in tree(process.pid)))
            time.sleep(0.02)

    thread = threading.Thread(target=watch)
    thread.start()
    printed, _ = process.communicate()
    thread.join()
    if process.returncode:
        sys.exit(f"{name} failed")
    return {**json.loads(printed.splitlines()[-1]), "peak": peak[0]}


def tree(pid: int) -> list[int]:
    """A process and all below it."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(p for child in children for p in tree(int(child)))]


def anonymous(pid: int) -> int:
    """Bytes of memory that no file backs."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def accuracy(base: Path, tuned: Path, folder: Path, loop: Path, matrices: int) -> list[str]:
    """Worst |alignment − that of float64 gesdd| on resolved ranks, for specbasis and for the float32 loop."""
    import numpy as np
    import pyarrow.compute as pc
    import torch
    from safetensors import safe_open

    import specbasis as package

    rows = package.load(folder).rows
    theirs = torch.load(loop, weights_only=True)
    worst = {"specbasis": 0.0, "torch.linalg.svd float32": 0.0}
    resolved = total = 0
    with safe_open(base, "pt") as a, safe_open(tuned, "pt") as b:
        names = list(a.keys())
        for name in names[:: max(1, len(names) // matrices)][:matrices]:
            (Ua, _, Va), (Ub, _, Vb) = (
                torch.linalg.svd(c.get_tensor(name).double(), full_matrices=False) for c in (a, b)
            )
            for side, exact in enumerate(((Ua * Ub).sum(0).abs().numpy(), (Va * Vb).sum(1).abs().numpy())):
                measure = ("alignment_left", "alignment_right")[side]
                mine = rows.filter((pc.field("matrix") == name) & (pc.field("measure") == measure))
                keep = np.array(mine["resolved"].to_pylist(), bool)
                values = mine["value"].to_numpy()
                resolved, total = resolved + int(keep.sum()), total + len(keep)
                found = {"specbasis": values, "torch.linalg.svd float32": theirs[name][side].numpy()}
                for who, value in found.items():
                    worst[who] = max(worst[who], float(np.abs(value - exact)[keep].max()))
    return [
        f"worst error of an alignment on resolved ranks ({resolved} of {total}), {who}: {w:.1e}"
        for who, w in worst.items()
    ]


def peer_python(name: str, arguments: argparse.Namespace) -> str | None:
    """A Python that has a peer: named by a flag or the environment, made, or none; says which."""
    package, maker = PEERS[name], getattr(arguments, f"make_{name}")
    if maker:
        folder = HERE / f".{name}"
        python = str(folder / "bin/python")
        if not Path(python).exists():
            print(f"making an environment with {package} in {folder}")
            subprocess.run([maker, "-m", "venv", folder], check=True)
            packages = ["torch==2.13.0", package, "safetensors"]
            subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
        return python
    flag = f"{name}_python"
    python = getattr(arguments, flag) or os.environ.get(flag.upper())
    print(f"{package}: {python or f'left out; name its Python with --{name}-python or {flag.upper()}'}")
    return python


def main() -> None:
    """Run the contenders in turns and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="bert-base")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", default="", help="contenders, separated by commas")
    parser.add_argument("--check", type=int, default=6, help="matrices compared with float64 gesdd")
    for name, package in PEERS.items():
        parser.add_argument(f"--{name}-python", help=f"a Python that has {package}")
        parser.add_argument(f"--make-{name}", metavar="PYTHON", help="make that environment with this Python")
    parser.add_argument("--contender", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contender:
        name, base, tuned, out, threads = arguments.contender
        print(json.dumps(CONTENDERS[name](base, tuned, out, int(threads))))
        return
    python = {name: peer_python(name, arguments) for name in PEERS}
    chosen = [name for name in CONTENDERS if not arguments.only or name in arguments.only.split(",")]
    chosen = [name for name in chosen if name not in PEERS or python[name]]
    with tempfile.TemporaryDirectory() as folder:
        base, tuned = write_pair(Path(folder), *SIZES[arguments.size])
        turns: list[dict[str, dict[str, float]]] = []
        for turn in range(arguments.turns):
            turns.append({})
            for name in chosen if turn % 2 == 0 else reversed(chosen):
                out = Path(folder) / f"{name}-{turn}"
                program = python.get(name) or sys.executable
                turns[-1][name] = run(name, program, base, tuned, out, arguments.threads)
        print(f"\n{arguments.size}: {SIZES[arguments.size]} blocks, width; float32, {arguments.threads} threads")
        print(f"{'':16}{'seconds':>9}{'CPU s':>9}{'peak MB':>9}  ratio of time: median (least … most), CPU, peak")
        for name in chosen:
            of = {key: statistics.median(t[name][key] for t in turns) for key in ("seconds", "cpu", "peak")}
            line = f"{name:16}{of['seconds']:9.2f}{of['cpu']:9.2f}{of['peak'] / 1e6:9.0f}"
            mine = PAIRS.get(name)
            if mine in chosen:
                ratios = {
                    key: sorted(t[mine][key] / t[name][key] for t in turns) for key in ("seconds", "cpu", "peak")
                }
                s, middle = ratios["seconds"], {key: statistics.median(r) for key, r in ratios.items()}
                line += f"  {middle['seconds']:.2f} ({s[0]:.2f} … {s[-1]:.2f}), "
                line += f"{middle['cpu']:.2f}, {middle['peak']:.2f}"
            print(line)
        if {"specbasis", "svd_loop"} <= set(chosen) and arguments.check:
            print(
                *accuracy(base, tuned, Path(folder) / "specbasis-0", Path(folder) / "svd_loop-0", arguments.check),
                sep="\n",
            )


if __name__ == "__main__":
    main()
