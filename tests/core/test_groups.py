"""Degenerate groups and matching against constructed cases."""

import pytest
import torch

from specbasis.core.groups import (
    degenerate_groups,
    group_alignment,
    matched_chance,
    matching,
)
from tests.helpers.matrices import gaussian, orthonormal


def test_groups_are_chains_of_ranks_closer_than_the_noise():
    S = torch.tensor([5.0, 3.01, 3.0, 2.99, 2.0, 1.0]).double()
    assert degenerate_groups(S, 0.01**2, 6).tolist() == [0, 1, 1, 1, 4, 5]
    assert degenerate_groups(S, 1e-8, 6).tolist() == [0, 1, 2, 3, 4, 5]
    assert degenerate_groups(S, 1.0, 2).tolist() == [0, 1]


def test_a_group_that_turned_inside_of_itself_is_aligned_as_a_subspace():
    U = orthonormal(20, 6, 1)
    R = torch.block_diag(torch.eye(1), orthonormal(3, 3, 2), torch.eye(2)).double()
    C = U.mT @ (U @ R)
    first = torch.tensor([0, 1, 1, 1, 4, 5])
    assert float(C.diagonal()[1:4].abs().min()) < 0.9
    starts, alignments, sizes = group_alignment(C, first)
    assert (starts, sizes) == ([1], [3])
    assert alignments[0] == pytest.approx(1)


def test_matching_finds_a_permutation_inside_of_its_band_and_no_further():
    order = torch.tensor([1, 0, 2, 4, 3])
    C = torch.eye(5).double()[:, order]
    assert matching(C, C).tolist() == order.argsort().tolist()
    far = torch.eye(5).double()[:, torch.tensor([4, 1, 2, 3, 0])]
    assert (matching(far, far, band=2) - torch.arange(5)).abs().max() <= 2
    k, d = 12, 40
    (left, error), _ = matched_chance(k, d, d)
    plain = gaussian(k, k, 7).abs().mean() / d**0.5
    assert left > float(plain)  # choosing the best is more than chance at equal rank
    assert 0 < error < 0.1 * left
