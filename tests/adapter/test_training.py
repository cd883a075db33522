"""Training under the real Trainer and in two processes, and the drift that the callback logs."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

peft = pytest.importorskip("peft", minversion="0.21")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from peft import PeftModel, get_peft_model  # noqa: E402
from torch import nn  # noqa: E402

from specbasis.adapter import SpectralConfig, SpectralLinear  # noqa: E402
from specbasis.adapter.callback import DriftCallback, drifts  # noqa: E402
from tests.adapter.helpers import TARGETS, load_classifier, save_deberta  # noqa: E402
from tests.helpers.patience import PATIENCE  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


def rows(count: int = 32) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 100, (count, 8), generator=generator)
    return [{"input_ids": each, "labels": each[0] % 3} for each in ids]


def test_trainer_trains_saves_resumes_and_restores(tmp_path):
    base = save_deberta(tmp_path / "base", layers=2)
    torch.manual_seed(0)
    model = get_peft_model(
        load_classifier(base),
        SpectralConfig(
            rank=16, target_modules=TARGETS, blocks_to_transform=[-1], task_type="SEQ_CLS", save_basis=False
        ),
    )
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    drift = DriftCallback()

    def trainer(model, steps, gradient_checkpointing=False):
        arguments = transformers.TrainingArguments(
            tmp_path / "run",
            max_steps=steps,
            per_device_train_batch_size=8,
            learning_rate=1e-2,
            logging_steps=2,
            save_steps=4,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            seed=1,
            gradient_checkpointing=gradient_checkpointing,
        )
        return transformers.Trainer(model, arguments, train_dataset=rows(), eval_dataset=rows(), callbacks=[drift])

    run = trainer(model, 8)
    before = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < before
    for name, parameter in model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name
    values = [next(v for k, v in row.items() if k != "step") for row in drift.history if len(row) > 1]
    assert values[0] == 0
    assert values[-1] > 1e-3
    assert any(key.startswith("spectral_drift/") for log in run.state.log_history for key in log)

    ids = torch.stack([row["input_ids"] for row in rows(4)])
    with torch.no_grad():
        wanted = model.eval()(ids).logits
        saved = PeftModel.from_pretrained(load_classifier(base), tmp_path / "run" / "checkpoint-8").eval()
        assert torch.equal(saved(ids).logits, wanted)

    resumed = PeftModel.from_pretrained(load_classifier(base), tmp_path / "run" / "checkpoint-4", is_trainable=True)
    again = trainer(resumed, 8, gradient_checkpointing=True)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    with torch.no_grad():
        assert torch.allclose(resumed.eval()(ids).logits, wanted, atol=1e-4)


def test_drift_is_that_of_the_weight():
    layer = SpectralLinear(nn.Linear(20, 12), interval=(0, 12))
    layer.spectral_M["default"].data.normal_(std=0.1)
    delta = layer.get_delta_weight("default")
    wanted = float(delta.norm() / layer.base_layer.weight.norm())
    assert drifts(nn.Sequential(layer))["layer"] == pytest.approx(wanted, rel=1e-4)


TWO = Path(__file__).parent / "two_processes.py"


def _run(*command: str) -> str:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_accelerate_launch_with_two_processes_is_one_process(tmp_path):
    """Two ranks with half a batch each take the same steps as one with the whole batch, and both hold the same
    cores."""
    save_deberta(tmp_path / "base", layers=2)
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_machines",
        "1",
        "--num_processes",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--num_cpu_threads_per_process",
        "1",
        str(TWO),
        "accelerate",
        str(tmp_path),
    ]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    # On CPUs accelerate leaves starting several processes to MPI, and reads the ranks from the environment.
    ranks = [
        subprocess.Popen(
            [*launch, "2"],
            env={
                **os.environ,
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    for process in ranks:
        _, errors = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, errors[-3000:]
    subprocess.run([*launch, "1"], check=True, capture_output=True, timeout=PATIENCE)
    two, one = (json.loads((tmp_path / f"cores{n}.json").read_text()) for n in (2, 1))
    assert two["ranks_agree"]
    assert two["world"] == 2
    for name, core in one["cores"].items():
        assert torch.allclose(torch.tensor(core), torch.tensor(two["cores"][name]), atol=1e-5), name
        assert torch.tensor(core).abs().max() > 0


@pytest.mark.slow
def test_fully_sharded_two_processes(tmp_path):
    """FSDP2: factors are sharded as parameters, one step equals the unsharded one."""
    _run("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(TWO), "fsdp", str(tmp_path), "2")
    found = json.loads((tmp_path / "fsdp.json").read_text())
    assert found["sharded"]
    assert found["difference"] < 1e-5
