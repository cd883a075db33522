"""ANARCII's task: the numbers of the residues of antibodies and T-cell receptors."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from specbasis.checkpoint import open_checkpoint
from specbasis.core.errors import InputError, MissingExtra
from specbasis.core.extras import command, require
from specbasis.core.options import check_choice
from specbasis.interventions.evaluators.kit import FORMS, want_finite
from specbasis.interventions.samples import Sample, ratio

CHAINS: Mapping[str, str] = {"antibody": "HKL", "tcr": "ABGD", "shark": "H"}
"""Receptor → the chain types that its model numbers; germline V genes of sharks are in no package."""

_RESIDUES = "ACDEFGHIKLMNPQRSTVWXY"
_REMOVED = (111, 112, 110, 113, 109, 114, 108, 115, 107, 116, 106, 117)
"""The order in which IMGT leaves positions of CDR3 empty as it gets shorter than 13."""


@dataclass(frozen=True, eq=False)
class Numbering:
    """ANARCII's task: the IMGT number of every residue of a receptor's variable domain.

    Domains are germline V and J genes joined, whose numbers are known from IMGT's alignment; they come from the
    package ``anarci``, read as data. CDR3 is renumbered by IMGT's rule, since it is made of two genes.

    Attributes:
        receptor: a key of `CHAINS`.
        count: domains, spread evenly over chains and species, drawn with a fixed seed.
        metric: ``exact``, the share of domains whose labels are all right. Greedy decoding, which is what ANARCII
            does, gives exactly these right, since it takes the right path if and only if each step on it is the
            likeliest. ``labels`` is the share of labels, ``loss`` the nats of one, with the right ones before it.

    Source: Lefranc et al. 2003, IMGT unique numbering for V-domains; Dunbar & Deane 2016 for the germline table.
    """

    receptor: str
    count: int = 240
    metric: str = "exact"

    def __post_init__(self) -> None:
        check_choice("receptor", self.receptor, CHAINS)

    def load(self, source: str) -> nn.Module:
        """ANARCII's encoder–decoder with the weights of a checkpoint."""
        require("anarcii", purpose="the task of ANARCII needs")
        from anarcii.inference.model import S2S, Decoder, Encoder

        weights = open_checkpoint(source)
        if "encoder.tok_embedding.weight" not in weights:
            raise InputError(f"{source}: is no model of ANARCII, and anarcii:{self.receptor} judges no other")
        device = torch.device("cpu")
        width = weights["encoder.tok_embedding.weight"].shape[1]
        layers = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("encoder.layers."))
        hidden = weights["encoder.layers.0.positionwise_feedforward.fc_1.weight"].shape[0]
        half = (width, layers, 4, hidden, 0.0, device)  # every published model has 4 heads
        tables = [weights[f"{side}.tok_embedding.weight"].shape[0] for side in ("encoder", "decoder")]
        model = S2S(Encoder(tables[0], *half), Decoder(tables[1], *half), 0, 0, device)
        model.load_state_dict({name: tensor.clone() for name, tensor in weights.items()})
        ready: nn.Module = model.eval()
        return ready

    @cached_property
    def _batches(self) -> list[tuple[Tensor, Tensor]]:
        domains = germline_domains(self.receptor, self.count)
        letters = {letter: 4 + index for index, letter in enumerate(_RESIDUES)}
        # Vocabulary of the decoder: 4 special tokens, 1 … 128, X, then the chains.
        chains = {letter: 4 + 128 + 1 + index for index, letter in enumerate(_decoder_chains(self.receptor))}
        encoded = [
            (
                torch.tensor([1, *(letters[residue] for residue in sequence), 2]),
                torch.tensor([1, chains[chain], *(3 + number for number in numbers), 2]),
            )
            for chain, sequence, numbers in domains
        ]
        encoded.sort(key=lambda pair: len(pair[0]))
        parts = (encoded[start : start + 128] for start in range(0, len(encoded), 128))
        return [
            (_together([source for source, _ in part]), _together([target for _, target in part])) for part in parts
        ]

    def __call__(self, model: nn.Module) -> dict[str, Sample]:
        """``exact``, ``labels`` and ``loss`` of every domain."""
        rows: list[Tensor] = []
        anarcii: Any = model
        with torch.inference_mode():
            for source, target in self._batches:
                hidden, inputs, labels = source == 0, target[:, :-1], target[:, 1:]
                later = torch.ones(inputs.shape[1], inputs.shape[1]).triu(1).bool()
                logits, _ = anarcii.decoder(inputs, anarcii.encoder(source, hidden), inputs == 0, later, hidden)
                want_finite(logits)
                wanted = labels != 0
                loss = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none") * wanted
                right = (logits.argmax(-1) == labels) & wanted
                rows.append(torch.stack([loss.sum(1), right.sum(1), wanted.sum(1)], dim=1))
        loss_sum, right_sum, total = torch.cat(rows).double().numpy().T
        return {
            "exact": Sample((right_sum == total).astype(np.float64)[:, None]),
            "labels": Sample(np.stack([right_sum, total], axis=1), ratio),
            "loss": Sample(np.stack([loss_sum, total], axis=1), ratio, higher_is_better=False),
        }


def _together(sequences: list[Tensor]) -> Tensor:
    """Sequences of labels as one tensor, padded with zeros."""
    padded: Tensor = nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    return padded


def _decoder_chains(receptor: str) -> str:
    return "ABGD" if receptor == "tcr" else "HLK"


def germline_domains(receptor: str, count: int) -> list[tuple[str, str, list[int]]]:
    """(chain, residues, IMGT number of each) of variable domains joined from germline V and J genes.

    Raises:
        InputError: the package ``anarci`` is not installed.
    """
    genes = _germlines()
    random = np.random.default_rng(0)
    groups = [
        (chain, list(genes["V"][chain][species].values()), list(genes["J"][chain][species].values()))
        for chain in CHAINS[receptor]
        for species in sorted(genes["V"][chain])
        if species in genes["J"][chain]
    ]
    domains = []
    for number in range(20 * count):
        chain, heads, tails = groups[number % len(groups)]
        head, tail = (options[random.integers(len(options))] for options in (heads, tails))
        domain = _joined(head, tail)
        if domain and (chain, *domain) not in domains:
            domains.append((chain, *domain))
        if len(domains) == count:
            break
    return domains


def _joined(head: str, tail: str) -> tuple[str, list[int]] | None:
    """A V and a J gene as residues and numbers; None where a gene is incomplete or CDR3 is no germline one."""
    loop = (head[104:] + tail[:117]).replace("-", "")
    if head[22] != "C" or head[103] != "C" or tail[117] not in "WF" or not 3 <= len(loop) <= 13:
        return None
    left_out = set(_REMOVED[: 13 - len(loop)])
    numbers = [i + 1 for i in range(104) if head[i] != "-"]
    numbers += [n for n in range(105, 118) if n not in left_out]
    numbers += [i + 1 for i in range(117, 128) if tail[i] != "-"]
    residues = head[:104].replace("-", "") + loop + tail[117:].replace("-", "")
    return (residues, numbers) if set(residues) <= set(_RESIDUES) and len(residues) > 90 else None


def _germlines() -> Mapping[str, Any]:
    """The table of germline genes in the package anarci, read as a literal: the package is not imported."""
    spec = importlib.util.find_spec("anarci")
    folders = list(spec.submodule_search_locations or []) if spec else []
    file = Path(folders[0]) / "germlines.py" if folders else None
    if file is None or not file.is_file():
        raise MissingExtra(f"germline sequences need anarci, which is not installed: {command('numbering')}")
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "all_germlines":
            genes: Mapping[str, Any] = ast.literal_eval(node.value)
            return genes
    raise InputError(f"{file}: holds no all_germlines; want anarci 2020 or newer")


FORMS["anarcii"] = lambda receptor, options: Numbering(receptor, options.get("limit") or 240)
