"""Bottleneck adapters against the library `adapters`: its outputs on pico models with the same weights."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from specbasis.finetuning.methods import attach  # noqa: E402
from specbasis.finetuning.methods.kit import additions  # noqa: E402
from tests.finetuning.methods import adapters_reference as library  # noqa: E402

REFERENCE = json.loads(Path(__file__).with_name("adapters_reference.json").read_text())


@pytest.fixture(autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()


def pico(kind, folder):
    """The model of the reference, read from the names and shapes that its version of transformers gave."""
    shapes = REFERENCE["models"][kind]["shapes"]
    library.config_of(kind).save_pretrained(folder)
    save_file(
        {name: library.values(name, shape) for name, shape in shapes.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    return transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()


@pytest.mark.parametrize("method", library.KINDS)
@pytest.mark.parametrize("kind", library.CONFIGS)
def test_bottlenecks_compute_what_the_library_adapters_computes(kind, method, tmp_path):
    expected = REFERENCE["models"][kind][method]
    inputs = library.inputs_of(kind)
    model = pico(kind, tmp_path)
    with torch.no_grad():
        plain = model(**inputs).last_hidden_state[0]
    attached = attach(model, method, rank=library.BOTTLENECK)
    layers = list(additions(model).values())
    places = [
        (site.block, "mh_adapter" if site.roles == ("attention.output",) else "output_adapter")
        for site in attached.request.sites
    ]
    assert attached.counts.adapter == expected["parameters"]
    for child, (block, place) in zip(layers, places, strict=True):
        library.fill((child.down, child.up), block, place)
    with torch.no_grad():
        found = model(**inputs).last_hidden_state[0]
    wanted = torch.tensor(expected["hidden"])
    assert (plain - wanted).abs().max() > 0.05  # the adapter is not without effect
    # The reference is rounded to 1e-7; float32 through two blocks of width 8 adds a few eps of values up to 2.
    torch.testing.assert_close(found, wanted, rtol=0, atol=64 * torch.finfo(torch.float32).eps)


@pytest.mark.slow
def test_the_reference_is_what_the_library_gives_now():
    python = os.environ.get("ADAPTERS_PYTHON")
    if not python:
        pytest.skip("set ADAPTERS_PYTHON to a Python with the library `adapters` (it pins another transformers)")
    run = subprocess.run([python, library.__file__], capture_output=True, text=True, check=True)
    found = json.loads(run.stdout)["models"]
    for kind, reference in REFERENCE["models"].items():
        for method in library.KINDS:
            assert found[kind][method]["parameters"] == reference[method]["parameters"]
            torch.testing.assert_close(
                torch.tensor(found[kind][method]["hidden"]),
                torch.tensor(reference[method]["hidden"]),
                rtol=0,
                atol=1e-6,
            )
