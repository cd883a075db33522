"""Links from a page to a file outside docs/: the site brings the file along, and is whole wherever it lies."""

from __future__ import annotations

import re
from pathlib import Path
from posixpath import join, normpath, relpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

LINK = re.compile(r"(?P<bang>!?)\[(?P<text>[^\]]*)\]\((?P<target>\.\./[^)#\s]*)(?P<anchor>#[^)]*)?\)")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
FOLDER = "repository"
"""Where the site keeps what it brings along."""


def _outside(page: str, target: str) -> str | None:
    """The path from the root of the repository that a link of a page means; None where it stays in docs/."""
    path = normpath(join("docs", page, "..", target))
    return None if path.startswith("docs/") else path


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add every file that a page links to and that lies outside docs/."""
    root = Path(config.docs_dir).parent
    for file in list(files.documentation_pages()):
        for link in LINK.finditer(FENCE.sub("", file.content_string)):
            path = _outside(file.src_uri, link["target"])
            if path and not (root / path).exists():
                raise PluginError(f"docs/{file.src_uri} links to {link['target']}, and there is no such file")
            if path and (root / path).is_file() and path != "README.md":
                name = f"{FOLDER}/{path}" + (".txt" if path.endswith(".md") else "")  # a page would need a place
                if name not in files.src_uris:
                    files.append(File.generated(config, name, abs_src_path=str(root / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point such links at what the site has; a folder is named, and is not a link."""
    uri = page.file.src_uri

    def replacement(link: re.Match[str]) -> str:
        path = _outside(uri, link["target"])
        if path is None:
            return link[0]
        if path == "README.md":
            target = "index.md"
        elif (Path(config.docs_dir).parent / path).is_dir():
            return f"{link['text']} (`{path}` in the repository)"
        else:
            target = f"{FOLDER}/{path}" + (".txt" if path.endswith(".md") else "")
        return f"{link['bang']}[{link['text']}]({relpath(target, join(uri, '..'))})"

    return LINK.sub(replacement, markdown)
