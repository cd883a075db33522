"""A task head on the mean of an encoder's last states, which is what sentence encoders are pretrained to give.

A text goes through the encoder alone. Of one text the head is linear on its mean u; of two on (u, v, |u − v|, u·v).
transformers' own classes put the head on the first state, and both texts of a pair through the encoder at once.

Source: Reimers & Gurevych 2019 (arXiv 1908.10084), §3, mean pooling; the features of a pair from Conneau et al.
2017 (arXiv 1705.02364), §3.2. Deviation: no hidden layer in the head.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from specbasis.checkpoint import open_checkpoint
from specbasis.core.errors import InputError
from specbasis.core.pooling import mean_state

FEATURES = {False: 1, True: 4}
"""Widths of the encoder that the head reads, by whether there are two texts."""


def under_mean_head(backbone: Any, pair: bool) -> Any:
    """An encoder under a new head of `backbone.config.num_labels` outputs, drawn from torch's generator.

    The model is of the encoder's family, so its parameters have the names that they have below other heads. A
    pooler of the first state, which nothing reads then, is taken off.

    Raises:
        InputError: the encoder does not say how wide its states are.
    """
    if not isinstance(getattr(backbone.config, "hidden_size", None), int):
        raise InputError(f"{type(backbone).__name__}: has no hidden_size; a mean head stands on a text encoder")
    kind: Any = type(backbone)
    model = _class(kind)(backbone.config, pair=pair)
    if getattr(backbone, "pooler", None) is not None:
        backbone.pooler = None
    setattr(model, model.base_model_prefix, backbone)
    return model


@functools.cache
def _class(encoder: Any) -> Any:
    """The model with a mean head, as a class of its encoder's family in transformers."""
    family: Any = next(kind for kind in encoder.__mro__ if PreTrainedModel in kind.__bases__)

    class MeanHead(family):
        """See the module."""

        def __init__(self, config: Any, pair: bool = False) -> None:
            super().__init__(config)
            self.pair = pair
            # No name that a class of transformers has, which would read this head as one on the first state.
            self.mean_head = nn.Linear(FEATURES[pair] * config.hidden_size, config.num_labels)
            self.post_init()

        @classmethod
        def from_pretrained(cls, folder: str | Path) -> Any:
            """What `save_pretrained` wrote."""
            config = AutoConfig.from_pretrained(folder)
            stored = open_checkpoint(folder)
            pair = stored["mean_head.weight"].shape[1] != config.hidden_size
            model = under_mean_head(AutoModel.from_pretrained(folder, config=config, dtype=torch.float32), pair)
            model.mean_head.load_state_dict({name: stored[f"mean_head.{name}"] for name in ("weight", "bias")})
            return model

        def forward(
            self,
            input_ids: Tensor | None = None,
            attention_mask: Tensor | None = None,
            labels: Tensor | None = None,
            **inputs: Any,
        ) -> SequenceClassifierOutput:
            """Rows are texts; of pairs the first and the second of each example follow each other."""
            inputs = {name: value for name, value in inputs.items() if value is not None}
            states = self.base_model(input_ids=input_ids, attention_mask=attention_mask, **inputs)[0]
            logits = self.mean_head(features(states, attention_mask, self.pair))
            return SequenceClassifierOutput(loss=_loss(logits, labels, self.config), logits=logits)

    # Under this name a configuration is saved, for readers that know the encoder alone.
    MeanHead.__name__ = encoder.__name__
    return MeanHead


def features(
    states: Float[Tensor, "texts tokens width"], mask: Tensor | None, pair: bool
) -> Float[Tensor, "examples features"]:
    """What the head reads: the mean over each text's own tokens; of pairs (u, v, |u − v|, u·v)."""
    mean = states.mean(1) if mask is None else mean_state(states, mask)
    if not pair:
        return mean
    u, v = mean[0::2], mean[1::2]
    return torch.cat([u, v, (u - v).abs(), u * v], dim=1)


def _loss(logits: Tensor, labels: Tensor | None, config: Any) -> Tensor | None:
    if labels is None:
        return None
    if config.problem_type == "regression":
        return F.mse_loss(logits.squeeze(1), labels.to(logits.dtype))
    return F.cross_entropy(logits, labels)
