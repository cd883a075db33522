"""The callback in transformers' own Trainer: its figures against a hand-made SVD, its cost, its warnings."""

import json
import logging

import pytest
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, Trainer, TrainingArguments

from specbasis.core.errors import InputError
from specbasis.tracking.callback import SpectralCallback


class Plain(PreTrainedModel):
    config_class = PretrainedConfig

    def __init__(self, width=12):
        super().__init__(PretrainedConfig())
        self.layers = nn.ModuleList([nn.Linear(width, width) for _ in range(2)])
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight)

    def forward(self, x, labels=None):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return {"loss": (x - labels).square().mean(), "logits": x}


def trainer(folder, callback, steps=6, model=None, rate=1e-2):
    g = torch.Generator().manual_seed(0)
    data = [{"x": torch.randn(12, generator=g), "labels": torch.randn(12, generator=g)} for _ in range(16)]
    arguments = TrainingArguments(
        str(folder), max_steps=steps, learning_rate=rate, logging_steps=2, report_to=[], save_strategy="no",
        use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    torch.manual_seed(0)
    return Trainer(model or Plain(), arguments, train_dataset=data, callbacks=[callback])


def test_what_is_recorded_is_the_alignment_to_the_start(tmp_path):
    torch.manual_seed(1)
    model, callback = Plain(), SpectralCallback(ranks=3, every=2)
    W0 = model.layers[1].weight.detach().double().clone()
    run = trainer(tmp_path, callback, model=model)
    run.train()
    assert [entry["step"] for entry in callback.history] == [2, 4, 6]
    W = model.layers[1].weight.detach().double()
    (U0, S0, V0), (U, S, V) = torch.linalg.svd(W0), torch.linalg.svd(W)
    found = callback.history[-1]["matrices"]["layers.1.weight"]
    torch.testing.assert_close(
        torch.tensor(found["alignment_left"]).double(), (U0 * U).sum(0).abs()[:3], atol=1e-6, rtol=0
    )
    torch.testing.assert_close(
        torch.tensor(found["alignment_right"]).double(), (V0 * V).sum(1).abs()[:3], atol=1e-6, rtol=0
    )
    torch.testing.assert_close(torch.tensor(found["singular_values"]).double(), S[:3], atol=1e-6, rtol=1e-6)
    assert found["update"] == pytest.approx(float((W - W0).norm()))
    assert found["relative_update"] == pytest.approx(float((W - W0).norm() / S0.norm()))
    lines = (tmp_path / "spectral.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == callback.history
    logged = [log for log in run.state.log_history if "spectral/alignment" in log]
    assert logged
    assert 0 < logged[-1]["spectral/alignment"] <= 1


def test_the_default_frequency_keeps_to_its_budget(tmp_path, monkeypatch):
    """On a clock that only steps and measurements move: 1 s a step, 3 s a measurement, 2 s for the start."""
    from specbasis.tracking import callback as module

    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    measure, begin = module._Start.measure, SpectralCallback._start

    def slow(self, *args):
        now[0] += 1.5  # for each of two matrices
        return measure(self, *args)

    def slow_start(self, *args):
        now[0] += 1.0
        return begin(self, *args)

    class Clock(SpectralCallback):
        def on_step_end(self, args, state, control, **kwargs):
            now[0] += 1.0
            super().on_step_end(args, state, control, **kwargs)

    monkeypatch.setattr(module._Start, "measure", slow)
    monkeypatch.setattr(SpectralCallback, "_start", slow_start)
    callback = Clock(budget=0.05)
    trainer(tmp_path, callback, steps=200).train()
    steps = [entry["step"] for entry in callback.history]
    assert 3 <= len(steps) <= 5
    assert callback.seconds <= 0.05 * now[0] + 3.0  # the last measurement is taken at the end whatever it costs


@pytest.mark.parametrize("what", ["warn", "stop"])
def test_intruders_are_told_and_can_stop_the_training(tmp_path, caplog, what):
    class Injects(SpectralCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:  # a direction that mixes all others, and is made the largest
                W = kwargs["model"].layers[0].weight
                with torch.no_grad():
                    u = self._starts["layers.0.weight"].left.sum(dim=1).to(W)
                    W += 50 * torch.outer(u / u.norm(), torch.ones(len(W)) / len(W) ** 0.5)
            super().on_step_end(args, state, control, **kwargs)

    callback = Injects(ranks=3, every=1, on_intruders=what)
    run = trainer(tmp_path, callback, rate=1e-6)
    with caplog.at_level(logging.WARNING):
        run.train()
    assert callback.history[1]["matrices"]["layers.0.weight"]["intruders"] == []
    assert callback.history[2]["matrices"]["layers.0.weight"]["intruders"] == [0]
    assert run.state.global_step == (3 if what == "stop" else 6)
    assert sum("intruder directions in layers.0.weight (ranks 1)" in one.message for one in caplog.records) == 1


@pytest.mark.parametrize("wrong", [{"every": 0}, {"budget": 0.0}, {"on_intruders": "panic"}, {"roles": ["nose"]}])
def test_bad_settings_are_refused(wrong):
    with pytest.raises(InputError, match=r"want|there is"):
        SpectralCallback(**wrong)


def test_no_matrix_to_follow_is_said(tmp_path):
    with pytest.raises(InputError, match="no matrix to follow"):
        trainer(tmp_path, SpectralCallback(name="nothing*")).train()
