"""The loop over tasks: every engine gives every result once, through deaths of workers and little memory."""

import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from specbasis.core.errors import InputError
from specbasis.jobs.engine import ATTEMPTS, free_memory, run
from tests.helpers.patience import until


@dataclass(frozen=True)
class Noted:
    """A task that notes when it runs, and kills its worker the first ``deaths`` times."""

    number: int
    folder: str
    flops: float = 1.0
    bytes: int = 1
    deaths: int = 0
    seconds: float = 0.0
    company: tuple[int, ...] = ()  # it ends when one of these has begun

    @property
    def name(self) -> str:
        return f"task {self.number}"

    def run(self) -> tuple[int, int]:
        note = Path(self.folder) / f"{self.number}-{time.monotonic_ns()}"
        note.touch()
        if len(list(Path(self.folder).glob(f"{self.number}-*"))) <= self.deaths:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.seconds)
        if self.company:
            until(lambda: any(list(Path(self.folder).glob(f"{other}-*")) for other in self.company))
        note.write_text(str(time.monotonic_ns()))
        return self.number, torch.get_num_threads()

    def spans(self) -> list[tuple[int, int]]:
        notes = [note for note in Path(self.folder).glob(f"{self.number}-*") if note.read_text()]
        return [(int(note.name.split("-")[1]), int(note.read_text())) for note in notes]


@pytest.mark.parametrize("engine", ["threads", "processes"])
def test_every_task_ends_once_on_one_thread(tmp_path, engine):
    tasks = [Noted(i, str(tmp_path), flops=i) for i in range(7)]
    found = list(run(tasks, workers=2, engine=engine))
    assert sorted(task.number for task, _ in found) == list(range(7))
    assert {result for _, result in found} == {(i, 1) for i in range(7)}


def test_the_longest_task_starts_first(tmp_path):
    tasks = [Noted(i, str(tmp_path), flops=flops) for i, flops in enumerate([1.0, 9.0, 4.0])]
    assert [task.number for task, _ in run(tasks, workers=1, engine="threads")] == [1, 2, 0]


def test_running_tasks_together_stay_inside_the_memory(tmp_path):
    sizes = [6, 6, 3, 3, 20]
    company = {i: tuple(j for j in range(4) if j != i) for i in range(4)}  # of the last there is room for none
    tasks = [Noted(i, str(tmp_path), bytes=size, company=company.get(i, ())) for i, size in enumerate(sizes)]
    list(run(tasks, workers=3, memory=10, engine="threads"))
    spans = [(*task.spans()[0], task.bytes) for task in tasks]
    for start, _, _ in spans:
        together = [size for begin, end, size in spans if begin <= start < end]
        assert sum(together) <= 10 or len(together) == 1
    assert any(len([1 for begin, end, _ in spans if begin <= start < end]) > 1 for start, _, _ in spans)


def test_a_task_whose_worker_dies_is_tried_again(tmp_path):
    tasks = [Noted(i, str(tmp_path), deaths=2 if i == 1 else 0, flops=9 - i) for i in range(5)]
    found = [task.number for task, _ in run(tasks, workers=2, engine="processes")]
    assert sorted(found) == list(range(5))


def test_a_task_that_kills_every_worker_is_named(tmp_path):
    tasks = [Noted(0, str(tmp_path), deaths=99, bytes=3 * 2**30), Noted(1, str(tmp_path), flops=0.5)]
    found = []
    with pytest.raises(InputError, match=rf"task 0: its worker died {ATTEMPTS} times.*3\.0 GiB"):
        found += list(run(tasks, workers=1, engine="processes"))
    assert len(list(tmp_path.glob("0-*"))) == ATTEMPTS


def test_an_error_of_a_task_reaches_the_caller_and_the_threads_are_restored(tmp_path):
    before = torch.get_num_threads()
    missing = Noted(0, str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError):
        list(run([missing], workers=2, engine="threads"))
    assert torch.get_num_threads() == before


def test_bad_engines_are_refused(tmp_path):
    with pytest.raises(InputError, match="engine = 'gpu'"):
        list(run([], workers=1, engine="gpu"))
    with pytest.raises(InputError, match="cannot reach engine 'processes'"):
        list(run([], workers=1, engine="processes", local=True))


def test_free_memory_is_of_this_machine():
    assert 2**20 < free_memory() < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.slow
def test_ray_gives_the_same_and_survives_a_killed_worker(tmp_path, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}")
    tasks = [Noted(i, str(tmp_path), deaths=1 if i == 2 else 0) for i in range(6)]
    found = {result for _, result in run(tasks, workers=2, engine="ray")}
    assert found == {(i, 1) for i in range(6)}
    assert len(list(tmp_path.glob("2-*"))) == 2


@pytest.mark.slow
def test_a_ray_node_that_goes_away_loses_nothing(tmp_path, monkeypatch):
    """Two nodes; the second is killed with a task on it that has begun: the first does that task again."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        second = cluster.add_node(num_cpus=1)
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        tasks = [Noted(i, str(tmp_path), flops=9 - i, seconds=3.0) for i in range(4)]
        running = run(tasks, workers=2, engine="ray")

        def lose() -> None:
            while len(list(tmp_path.glob("*-*"))) < 2:
                time.sleep(0.1)
            cluster.remove_node(second, allow_graceful=False)

        killer = threading.Thread(target=lose)
        killer.start()
        found = sorted(result[0] for _, result in running)
        killer.join()
        assert found == [0, 1, 2, 3]
        assert sum(len(list(tmp_path.glob(f"{i}-*"))) for i in range(4)) == 5, "one task ran twice"
    finally:
        cluster.shutdown()
