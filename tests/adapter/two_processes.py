"""Run by test_training in several processes: one training step sequence under accelerate, or one step under
FSDP2."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))
warnings.simplefilter("ignore")


def under_accelerate(folder: Path, world: int) -> None:
    from accelerate import Accelerator
    from peft import get_peft_model

    from specbasis.adapter import SpectralConfig
    from tests.adapter.helpers import TARGETS, load_classifier

    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == world
    torch.manual_seed(0)
    config = SpectralConfig(rank=8, target_modules=TARGETS, blocks_to_transform=[-1], task_type="SEQ_CLS")
    model = get_peft_model(load_classifier(folder / "base"), config).train()
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model, optimiser = accelerator.prepare(model, optimiser)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        ids = torch.randint(0, 100, (8, 6), generator=generator)
        part = ids.chunk(world)[accelerator.process_index]
        accelerator.backward(model(input_ids=part, labels=part[:, 0] % 3).loss)
        optimiser.step()
        optimiser.zero_grad()
    plain = accelerator.unwrap_model(model)
    cores = {n: p.detach() for n, p in plain.named_parameters() if "spectral_M" in n}
    gathered = accelerator.gather(torch.cat([core.flatten() for core in cores.values()])[None])
    if accelerator.is_main_process:
        found = {
            "world": accelerator.num_processes,
            "ranks_agree": all(torch.equal(gathered[0], row) for row in gathered),
            "cores": {n: core.tolist() for n, core in cores.items()},
        }
        (folder / f"cores{world}.json").write_text(json.dumps(found))
    accelerator.end_training()


def under_fsdp(folder: Path) -> None:
    import torch.distributed as dist
    from peft import get_peft_model
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    from specbasis.adapter import SpectralConfig
    from tests.adapter.helpers import linear

    dist.init_process_group("gloo")
    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))

    def make() -> nn.Module:
        model = nn.Sequential(linear(32, 24), nn.ReLU(), linear(24, 32))
        return get_peft_model(model, SpectralConfig(rank=6, target_modules=["0", "2"], shard_basis=True))

    torch.manual_seed(0)
    x = torch.randn(8, 24)
    plain, sharded = make(), make()
    layers = [sharded.base_model.model[i] for i in (0, 2)]
    for module in (*layers, sharded):
        fully_shard(module, mesh=mesh)
    optimisers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1) for m in (plain, sharded)]
    for model, optimiser in zip((plain, sharded), optimisers, strict=True):
        for _ in range(2):
            model(x).square().mean().backward()
            optimiser.step()
            optimiser.zero_grad()
    with torch.no_grad():
        difference = float((plain(x) - sharded(x)).abs().max())
    found = {
        "sharded": all(isinstance(layer.spectral_U["default"], DTensor) for layer in layers)
        or str(type(layers[0].spectral_U["default"])),
        "difference": difference,
    }
    if dist.get_rank() == 0:
        (folder / "fsdp.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    mode, place, processes = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    under_accelerate(place, processes) if mode == "accelerate" else under_fsdp(place)
