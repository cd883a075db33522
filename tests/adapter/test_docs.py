"""The how-to page runs as printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("peft", minversion="0.21")

from tests.adapter.helpers import save_deberta

PAGE = Path(__file__).parents[2] / "docs" / "adapter.md"


@pytest.mark.filterwarnings("ignore")
def test_examples_run(tmp_path, monkeypatch):
    save_deberta(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        exec(compile(block.replace("rank=300", "rank=20"), str(PAGE), "exec"), {})
    assert (tmp_path / "lora16" / "adapter_config.json").exists()
