"""The adapter's verbs on a saved adapter, as a user types them."""

import sys
from pathlib import Path

import pytest

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from specbasis import cli  # noqa: E402
from specbasis.adapter import SpectralConfig  # noqa: E402
from specbasis.adapter.folder import kept_shares  # noqa: E402


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    model = transformers.BertModel(transformers.BertConfig(vocab_size=50, **shape))
    model.save_pretrained(tmp_path / "base")
    model = transformers.BertModel.from_pretrained(tmp_path / "base")
    tuned = peft.get_peft_model(model, SpectralConfig(rank=5, target_modules=["intermediate.dense"]))
    for name, parameter in tuned.named_parameters():
        if "spectral_M" in name:
            parameter.data.normal_(0, 0.1)
    tuned.save_pretrained(tmp_path / "adapter")
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["specbasis", "adapter", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


def test_the_verbs(saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    folder, base = saved / "adapter", saved / "base"
    assert run(monkeypatch, "info", folder) == 0
    shown = capsys.readouterr().out
    assert "parameters: 50 adapter" in shown
    assert "ranks 1 … 5" in shown
    assert run(monkeypatch, "verify", folder, "--base", base) == 0
    assert "verified: 2 matrices" in capsys.readouterr().out
    assert run(monkeypatch, "merge", folder, "--base", base, "--out", saved / "merged") == 0
    assert (saved / "merged" / "model.safetensors").exists()
    assert run(monkeypatch, "export-lora", folder, "--base", base, "--out", saved / "lora") == 0
    assert (saved / "lora" / "adapter_model.safetensors").exists()
    assert "keeps" not in capsys.readouterr().out
    assert run(monkeypatch, "export-lora", folder, "--base", base, "--rank", 2, "--out", saved / "small") == 0
    kept = kept_shares(folder, 2)
    assert f"at rank 2 each layer keeps {min(kept.values()):.1%}" in capsys.readouterr().out


def test_a_wrong_base_is_one_line(
    saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = transformers.BertConfig.from_pretrained(saved / "base")
    transformers.BertModel(config).save_pretrained(saved / "other")
    capsys.readouterr()
    assert run(monkeypatch, "verify", saved / "adapter", "--base", saved / "other") == 2
    shown = capsys.readouterr()
    assert "verified" not in shown.out
    assert len([line for line in shown.err.splitlines() if line.startswith("error: ")]) == 1
    assert run(monkeypatch, "info", saved / "base") == 2
    assert "want the folder of a saved adapter" in capsys.readouterr().err
