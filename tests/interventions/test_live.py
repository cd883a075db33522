"""Edits on live models: written to the right place, taken back bit for bit whatever happens."""

import os
import signal
import subprocess
import sys
import textwrap
import threading

import pytest
import torch
from torch import nn

from specbasis import Edit, InputError, decompose, edited, matrix_edits, open_checkpoint
from specbasis.architecture.recognise import model_map
from specbasis.core.edits import mask, replace
from specbasis.interventions.live import state
from specbasis.interventions.stored import write_edited
from tests.helpers.patience import PATIENCE
from tests.interventions.models import Tied, bert, bits


def ffn(key):
    return key.role.startswith("ffn")


def test_only_the_wanted_matrices_change_and_they_come_back():
    model, other = bert(0), bert(1)
    before, stored = bits(model), state(model)
    edits = matrix_edits(Edit("swap", 4), stored, state(other), admits=ffn)
    assert len(edits) == 4
    expected = {}
    for ref in edits:
        W, B = ref.read(stored), ref.read(state(other))
        expected[ref.parameter] = replace(W, decompose(W), decompose(B), 4).float()
    expected = {name: W.clone() for name, W in expected.items()}
    with edited(model, edits) as same:
        assert same is model
        for name, W in model.state_dict().items():
            assert torch.equal(W, expected[name]) if name in expected else W.numpy().tobytes() == before[name]
    assert bits(model) == before


def test_fused_columns_of_a_conv1d_and_tied_weights():
    model = Tied()
    before, refs = bits(model), {ref.key.name: ref for ref in model_map(state(model)).matrices}
    fused = refs["inner.transformer.h.0.attn.c_attn.weight[key]"]
    embedding = refs["inner.transformer.wte.weight"]
    assert fused.transposed
    ids = torch.arange(8)[None]
    logits = model(ids).detach()
    with edited(model, {fused: lambda W: torch.zeros_like(W), embedding: lambda W: 2 * W}):
        stored = model.inner.transformer.h[0].attn.c_attn.weight
        assert not stored[:, 12:24].any()
        changed = stored.detach().clone()
        # The head is the embedding: one edit, both see it.
        assert torch.equal(model.inner.lm_head.weight, model.inner.transformer.wte.weight)
        assert model.inner.lm_head.weight.data_ptr() == model.inner.transformer.wte.weight.data_ptr()
        assert not torch.equal(model(ids), logits)
    assert torch.equal(changed[:, 24:], model.inner.transformer.h[0].attn.c_attn.weight[:, 24:])
    assert bits(model) == before
    assert torch.equal(model(ids), logits)


def test_a_family_that_transformers_stores_under_other_names(tmp_path):
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    size = {"image_size": 8, "patch_size": 4, "hidden_size": 12, "intermediate_size": 24}
    model = ViTForImageClassification(ViTConfig(**size, num_hidden_layers=2, num_attention_heads=2)).eval()
    model.save_pretrained(tmp_path / "base")
    base = open_checkpoint(tmp_path / "base")
    assert set(state(model)) == set(base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "tuned")
    before = bits(model)
    write_edited(tmp_path / "base", tmp_path / "tuned", Edit("swap", 4), tmp_path / "new", admits=ffn)
    edits = matrix_edits(Edit("swap", 4), state(model), base, admits=ffn)
    assert len(edits) == 4
    with edited(model, edits):
        assert bits(model) == bits(ViTForImageClassification.from_pretrained(tmp_path / "new"))
        assert bits(model) != before
    assert bits(model) == before
    weight = next(name for name, p in model.named_parameters() if p.shape == (24, 12))
    stored = next(name for name, tensor in base.items() if tensor.shape == (24, 12))
    for name in (weight, stored):  # by its name in the module and in the file
        with edited(model, {name: lambda W: 2 * W}):
            assert bits(model)[weight] != before[weight]
        assert bits(model) == before


def test_an_exception_in_the_body_and_a_bad_edit_leave_the_model_as_it_was():
    model = bert()
    before = bits(model)
    edits = matrix_edits(Edit("zero", 3), state(model), admits=ffn)
    with pytest.raises(ZeroDivisionError), edited(model, edits):
        raise ZeroDivisionError if bits(model) != before else RuntimeError("nothing was edited")
    assert bits(model) == before
    names = [ref.key.name for ref in edits]

    def fails(W):
        raise RuntimeError("in the second edit")

    for bad, error in (
        (fails, RuntimeError),
        (lambda W: W * float("nan"), InputError),
        (lambda W: W[:2], InputError),
    ):
        with (
            pytest.raises(error),
            edited(model, {names[0]: lambda W: 2 * W, names[1]: bad}),
        ):
            pytest.fail("the body must not run")
        assert bits(model) == before


def test_nested_edits_come_back_in_order():
    model = bert()
    before, name = bits(model), "bert.encoder.layer.0.intermediate.dense.weight"
    with edited(model, {name: lambda W: 2 * W}):
        outer = bits(model)
        with edited(model, {name: lambda W: W + 1}):
            pass
        assert bits(model) == outer
    assert bits(model) == before


def test_self_swap_and_complementary_masks_on_a_model():
    model = bert()
    stored = state(model)
    before = bits(model)
    with edited(model, matrix_edits(Edit("swap", "all"), stored, state(model), admits=ffn)):
        assert bits(model) == before
    for ref in model_map(stored, admits=ffn).matrices:
        W = ref.read(stored)
        s = decompose(W)
        assert torch.equal(mask(W, s, 5) + mask(W, s, "5:12"), W.double())


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ({"no.such": torch.eye(2)}, "no matrix 'no.such' in the model"),
        ({"bert.pooler.dense.weight": torch.eye(2)}, "got a matrix of shape"),
    ],
)
def test_bad_edits_are_told_in_one_line(edits, message):
    with pytest.raises(InputError, match=message), edited(bert(), edits):
        pass


def test_what_cannot_be_written_is_refused_before_anything_is():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    before = bits(model)
    model[1].weight.data = torch.empty(3, 2).T.fill_(1.0)
    with (
        pytest.raises(InputError, match="cannot be edited in place"),
        edited(model, {"0.weight": lambda W: 2 * W, "1.weight": lambda W: 2 * W}),
    ):
        pass
    assert model.state_dict()["0.weight"].numpy().tobytes() == before["0.weight"]
    twins = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    twins[1].weight = twins[0].weight
    with (
        pytest.raises(InputError, match="are the same numbers"),
        edited(twins, {"0.weight": lambda W: W, "1.weight": lambda W: W}),
    ):
        pass


def test_originals_are_read_again_instead_of_copied():
    model = bert()
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = bits(model)
    with edited(model, matrix_edits(Edit("zero", 2), state(model), admits=ffn), originals=kept):
        assert bits(model) != before
    assert bits(model) == before


INTERRUPTED = """
import signal, time, torch
from torch import nn
from specbasis import edited
torch.manual_seed(0)
torch.set_num_threads(1)
model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(20)))
before = [p.detach().clone() for p in model.parameters()]
names = {f"{i}.weight": (lambda W: W.double() * 2) for i in range(20)}
with edited(model, names):  # what is imported on the way is there from here on
    pass
left, seen, formers = 0, 0, set()
def strike(*_):  # three interrupts, close together, at any bytecode
    global left
    if left <= 0:  # a strike that was under way when the timer was stopped
        return
    left -= 1
    if not left:
        signal.setitimer(signal.ITIMER_REAL, 0)
    signal.raise_signal(signal.SIGINT)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may start jobs that ignore it
signal.signal(signal.SIGALRM, strike)
def work(delay):
    global left, seen
    if not left:
        left = 3
        signal.setitimer(signal.ITIMER_REAL, delay, 0.0004)
    while left:
        with edited(model, names):
            sum(range(500))
def survive(f, times):
    while True:
        try:
            return f() if not times else survive(f, times - 1)
        except KeyboardInterrupt:
            if not left:
                return
for number in range(40):
    survive(lambda: work(0.002 + 0.0007 * number), 3)
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters())), number
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert left == 0
print("intact")
"""


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_ctrl_c_at_any_moment_leaves_the_model_intact():
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(INTERRUPTED)], capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.stdout.strip() == "intact", done.stderr[-2000:]


def test_an_edit_works_outside_of_the_main_thread():
    model = bert()
    before, errors, handler = bits(model), [], signal.getsignal(signal.SIGINT)

    def work():
        try:
            with edited(model, matrix_edits(Edit("zero", 2), state(model), admits=ffn)):
                pass
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not errors
    assert bits(model) == before
    assert signal.getsignal(signal.SIGINT) is handler
