"""A masked autoencoder, images and trainings small enough for tests."""

import torch

from specbasis.paper.images import Images
from specbasis.paper.mae import MAE
from specbasis.paper.training import Training

TINY = MAE(
    image=8, patch=4, width=8, blocks=2, heads=2, decoder_width=8, decoder_blocks=1, decoder_heads=2, mask=0.5
)


def images(n=40, size=8, classes=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (n, 3, size, size), generator=g, dtype=torch.uint8)
    return Images(pixels, torch.arange(n) % classes, "noise")


def training(**changes):
    return Training(**({"steps": 9, "batch": 16, "checkpoints": 3, "validations": 3} | changes))


def state_of(run):
    from specbasis.checkpoint import open_checkpoint

    return {path.name: dict(open_checkpoint(path / "model.safetensors")) for path in [*run.checkpoints, run.best]}
