"""Ranks that cannot be told apart, and what replaces the comparison of equal indices there."""

from __future__ import annotations

import math
from functools import lru_cache
from statistics import mean, stdev

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

BAND = 10
"""How far matching looks: rank i of base may be matched with ranks i − BAND … i + BAND of tuned."""

DRAWS = 12
"""Random pairs of bases from which the chance level of matching is taken."""


def degenerate_groups(S: Float[Tensor, " n"], variance: float, k: int) -> Int[Tensor, " k"]:
    """For each leading rank the first rank of its group of ranks that noise mixes; itself where it is alone.

    Neighbours belong together where σ_i − σ_{i+1} ≤ √2·√variance, the coupling at which noise with this variance
    in each entry turns the two vectors by half a radian into each other; groups are chains of such neighbours.

    Args:
        S: all singular values, descending.
        variance: of an entry of the noise.
        k: number of leading ranks.
    """
    gaps = S[: min(k, len(S)) - 1] - S[1 : min(k, len(S))]
    return chains(gaps.cpu() > math.sqrt(2 * variance))


def chains(apart: Bool[Tensor, " k-1"]) -> Int[Tensor, " k"]:
    """The first of the chain that each of some neighbours belongs to, from whether each is apart from the next."""
    begins = torch.cat([apart.new_ones(1), apart])
    places = torch.arange(len(begins), device=begins.device)
    return torch.where(begins, places, 0).cummax(dim=0).values


def grouped(first: Int[Tensor, " k"]) -> Tensor:
    """Whether each rank shares its group with another one, from `degenerate_groups`."""
    return torch.bincount(first, minlength=len(first))[first] > 1


def group_alignment(C: Float[Tensor, "k k"], first: Int[Tensor, " k"]) -> tuple[list[int], list[float], list[int]]:
    """Alignment of each group of two or more ranks as a subspace: (first ranks, alignments, sizes).

    √(‖C_GG‖_F²/|G|), the root mean square cosine of the principal angles between the group's subspaces in base and
    tuned, 0 … 1, invariant to rotations inside of the group. Independent subspaces give √(|G|/d).
    """
    starts, alignments, sizes = [], [], []
    for start in sorted(set(first[grouped(first)].tolist())):
        members = (first == start).nonzero()[:, 0]
        block = C[members][:, members]
        starts.append(int(start))
        alignments.append(min(1.0, float(block.square().sum() / len(members)) ** 0.5))
        sizes.append(len(members))
    return starts, alignments, sizes


def matching(left: Float[Tensor, "k k"], right: Float[Tensor, "k k"], band: int = BAND) -> Int[Tensor, " k"]:
    """For each rank of base the rank of tuned that it is matched with: one to one, within a band.

    The assignment π with |π(i) − i| ≤ band that maximises Σ |⟨u_i, ũ_π(i)⟩⟨v_i, ṽ_π(i)⟩|. O(k³) at worst.

    Source: Kuhn 1955; Crouse 2016 (scipy.optimize.linear_sum_assignment).
    """
    from scipy.optimize import linear_sum_assignment

    k = len(left)
    places = torch.arange(k)
    far = (places[:, None] - places[None, :]).abs() > band
    score = (left * right).abs()
    score[far] = -k  # worse than any permutation inside of the band
    _, chosen = linear_sum_assignment(score.numpy(), maximize=True)
    return torch.from_numpy(chosen)


@lru_cache(maxsize=64)
def matched_chance(
    k: int, out: int, into: int, band: int = BAND
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Mean alignment that matching finds between independent directions: (mean, standard error), left and right.

    Sampled: `DRAWS` pairs of independent k × k matrices of cosines with the variances 1/out and 1/in, the same
        every time.
    """
    generator = torch.Generator().manual_seed(0)
    means: tuple[list[float], list[float]] = ([], [])
    places = torch.arange(k)
    for _ in range(DRAWS):
        pair = [torch.randn(k, k, generator=generator, dtype=torch.float64) / math.sqrt(d) for d in (out, into)]
        chosen = matching(pair[0], pair[1], band)
        for drawn, C in zip(means, pair, strict=True):
            drawn.append(float(C[places, chosen].abs().clamp(max=1.0).mean()))
    left, right = ((mean(drawn), stdev(drawn) / math.sqrt(DRAWS)) for drawn in means)
    return left, right
