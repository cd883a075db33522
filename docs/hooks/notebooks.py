"""The notebooks of examples/ as pages: their text, their code and the outputs that they hold; nothing is run."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

FOLDER = "notebooks"


def _output(output: dict[str, Any], picture: str) -> tuple[str, bytes | None]:
    """An output as Markdown, and the picture that it shows."""
    data = output.get("data", {})
    if "image/png" in data:
        return f"![Output of the cell above]({picture})\n", base64.b64decode("".join(data["image/png"]))
    if "text/html" in data:
        return f'<div class="output">{"".join(data["text/html"])}</div>\n'.replace("\n\n", "\n"), None
    text = "".join(output.get("text", data.get("text/plain", "")))
    return f"```text\n{text.rstrip()}\n```\n", None


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each notebook, and its pictures."""
    for notebook in sorted((Path(config.docs_dir).parent / "examples" / FOLDER).glob("*.ipynb")):
        parts: list[str] = []
        for number, cell in enumerate(json.loads(notebook.read_text(encoding="utf-8"))["cells"]):
            source = "".join(cell["source"])
            parts.append(f"```python\n{source}\n```\n" if cell["cell_type"] == "code" else source + "\n")
            for place, output in enumerate(cell.get("outputs", ())):
                picture = f"{notebook.stem}-{number}-{place}.png"
                text, image = _output(output, picture)
                parts.append(text)
                if image is not None:
                    files.append(File.generated(config, f"{FOLDER}/{picture}", content=image))
        parts.append(f"*The notebook is `examples/{FOLDER}/{notebook.name}` in the repository.*\n")
        files.append(File.generated(config, f"{FOLDER}/{notebook.stem}.md", content="\n".join(parts)))
    return files
