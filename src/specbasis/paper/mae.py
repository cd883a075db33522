"""The masked autoencoder of the paper's pretraining experiment, as data and as transformers' ViTMAE."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import ViTMAEConfig, ViTMAEForPreTraining, ViTMAEModel
from transformers.models.vit_mae.modeling_vit_mae import ViTMAEPreTrainedModel

from specbasis.checkpoint import open_checkpoint
from specbasis.core.errors import InputError


@dataclass(frozen=True)
class MAE:
    """Sizes of a masked autoencoder; the defaults are the paper's (ViT-Tiny encoder).

    Attributes:
        image: height and width of an image, in pixels.
        patch: height and width of a patch.
        width, blocks, heads: of the encoder.
        decoder_width, decoder_blocks, decoder_heads: of the decoder.
        mask: share of the patches that are hidden; floor((1 − mask)·patches) are kept: 25 of 64 at 60 %.

    Feed-forward layers are four times as wide as the model. The prediction of a patch has patch²·3 = 48 numbers,
    and the loss is their mean squared error over the hidden patches, of pixels that are not normalised patch by
    patch.

    Source: Yu et al. 2026, App. L. It leaves open: the class token (kept, as in He et al. 2022), the initialisation
    (transformers': normal with standard deviation 0.02, Xavier for the patches), and the scale of pixels (−1 … 1).
    """

    image: int = 32
    patch: int = 4
    width: int = 192
    blocks: int = 6
    heads: int = 3
    decoder_width: int = 64
    decoder_blocks: int = 2
    decoder_heads: int = 4
    mask: float = 0.6

    def __post_init__(self) -> None:
        whole = [value for name, value in asdict(self).items() if name != "mask"]
        if min(whole) < 1 or not 0 <= self.mask < 1:
            raise InputError(f"got {self}; want sizes of at least 1 and a mask in [0, 1)")
        for dimension, size, parts in (
            ("image", self.image, self.patch),
            ("width", self.width, 4),
            ("width", self.width, self.heads),
            ("decoder_width", self.decoder_width, 4),
            ("decoder_width", self.decoder_width, self.decoder_heads),
        ):
            if size % parts:
                raise InputError(f"got {dimension} = {size}; want a multiple of {parts}")

    @property
    def patches(self) -> int:
        """Patches of an image."""
        return (self.image // self.patch) ** 2

    def config(self) -> ViTMAEConfig:
        """The same as a configuration of transformers."""
        return ViTMAEConfig(
            image_size=self.image,
            patch_size=self.patch,
            num_channels=3,
            hidden_size=self.width,
            num_hidden_layers=self.blocks,
            num_attention_heads=self.heads,
            intermediate_size=4 * self.width,
            decoder_hidden_size=self.decoder_width,
            decoder_num_hidden_layers=self.decoder_blocks,
            decoder_num_attention_heads=self.decoder_heads,
            decoder_intermediate_size=4 * self.decoder_width,
            mask_ratio=self.mask,
            norm_pix_loss=False,
        )


class PatchClassifier(ViTMAEPreTrainedModel):
    """The encoder of a masked autoencoder, the mean over its patch tokens, and one linear layer.

    Source: Yu et al. 2026, App. L.
    """

    def __init__(self, config: ViTMAEConfig) -> None:
        super().__init__(config)
        self.vit = ViTMAEModel(config)
        self.head = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(self, pixel_values: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n classes"]:
        """Logits; every patch is seen, in its order."""
        patches = self.vit.embeddings.patch_embeddings.num_patches
        # Without a mask, what remains of masking is a shuffle by this noise: none.
        order = torch.arange(patches, dtype=torch.float32, device=pixel_values.device).expand(len(pixel_values), -1)
        tokens = self.vit(pixel_values, noise=order).last_hidden_state[:, 1:]
        logits: Tensor = self.head(tokens.mean(dim=1))
        return logits


Model: TypeAlias = nn.Module
"""A `ViTMAEForPreTraining` or a `PatchClassifier`."""


def new_mae(mae: MAE, seed: int) -> ViTMAEForPreTraining:
    """A masked autoencoder with random weights and fixed sine and cosine positions."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_seed(seed, "weights"))
        model = ViTMAEForPreTraining(mae.config())
        _complete(model.vit, model.decoder)
    return model


def new_classifier(mae: MAE, classes: int, seed: int) -> PatchClassifier:
    """A classifier with random weights; its encoder's are those of `new_mae` for the same seed."""
    config = mae.config()
    config.num_labels, config.mask_ratio = classes, 0.0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_seed(seed, "head"))
        model = PatchClassifier(config)
    model.vit.load_state_dict(new_mae(mae, seed).vit.state_dict())
    return model


def load_weights(model: Model, folder: Path, part: str = "") -> None:
    """Put the weights of a checkpoint into a model: those whose names begin so ("vit." is the encoder), or all.

    Raises:
        InputError: the checkpoint lacks one of them, or has one of another shape.
    """
    every, own = open_checkpoint(folder / "model.safetensors"), model.state_dict()
    stored, wanted = ({name: W for name, W in of.items() if name.startswith(part)} for of in (every, own))
    bad = sorted(
        name
        for name in wanted | stored
        if name not in stored or name not in wanted or stored[name].shape != wanted[name].shape
    )
    if bad:
        raise InputError(f"{folder}: {bad[0]} is missing or of another shape; want a checkpoint of the same sizes")
    model.load_state_dict({**own, **stored})


def save_model(model: Any, folder: Path) -> None:
    """Write a model as a folder of transformers: `config.json`, `model.safetensors`."""
    folder.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder)
    weights = {name: W.detach().cpu().contiguous() for name, W in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def positions(grid: int, width: int) -> Float[Tensor, "patches+1 width"]:
    """Sine and cosine position embeddings of a grid × grid image, a row of zeros first, for the class token.

    For the column and then the row p of a patch: sin(p·ω_j), cos(p·ω_j), ω_j = 10000^(−4j/width), j < width/4.

    Source: He et al. 2022 (its code puts columns first).
    """
    omega = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    rows, columns = torch.meshgrid(*[torch.arange(grid, dtype=torch.float64)] * 2, indexing="ij")
    angles = [place.flatten()[:, None] * omega for place in (columns, rows)]
    table = torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1)
    return torch.cat([torch.zeros(1, width, dtype=torch.float64), table]).float()


@torch.no_grad()
def _complete(vit: Any, decoder: Any) -> None:
    """Set what some versions of transformers leave at zero in a new model: positions, tokens, Xavier patches."""
    grid = int(vit.embeddings.patch_embeddings.num_patches**0.5)
    for table in (vit.embeddings.position_embeddings, decoder.decoder_pos_embed):
        table.copy_(positions(grid, table.shape[-1]))
    projection = vit.embeddings.patch_embeddings.projection
    nn.init.xavier_uniform_(projection.weight.flatten(1))
    for token in (vit.embeddings.cls_token, decoder.mask_token):
        nn.init.normal_(token, std=vit.config.initializer_range)


def _seed(seed: int, *names: object) -> int:
    """A seed for one purpose: streams of different purposes or indices are independent."""
    text = " ".join(map(str, (seed, *names)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
