"""What a finetune is against its base."""

import pytest
import torch
from safetensors.torch import save_file

from specbasis.checkpoint import open_checkpoint
from specbasis.core.errors import InputError
from specbasis.treatment.updates import updates


@pytest.mark.parametrize("scale", [1e-300, 1e-200, 1e200, 1e300])
def test_numbers_whose_squares_are_beyond_float64_are_said(tmp_path, scale):
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(6, 5, dtype=torch.float64, generator=generator)
    save_file({"x.weight": W * scale}, tmp_path / "a.safetensors")
    save_file({"x.weight": (W + 0.01 * W.flip(0)) * scale}, tmp_path / "b.safetensors")
    base, tuned = (open_checkpoint(tmp_path / f"{name}.safetensors") for name in "ab")
    (update,) = updates(base, tuned)
    with pytest.raises(InputError, match="have no squares in float64"):
        _ = update.is_changed
    (same,) = updates(base, base)
    assert scale > 1 or not same.is_changed
