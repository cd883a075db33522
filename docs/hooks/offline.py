"""The site opens as files, without a network: a page that would fetch anything from elsewhere is an error."""

from __future__ import annotations

import re

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError

FETCHED = re.compile(
    r"""<(?:script|img|iframe|source|video|audio)\b[^>]*\bsrc=["']?(?:https?:)?//[^"'>\s]+"""
    r"""|<link\b[^>]*\brel=["']?(?:stylesheet|preconnect|preload|icon)\b[^>]*\bhref=["']?(?:https?:)?//[^"'>\s]+"""
)


def on_post_page(output: str, page: object, config: MkDocsConfig) -> str:
    """Refuse a page with a script, a style, a font or a picture of another host."""
    found = FETCHED.search(output)
    if found:
        raise PluginError(f"{page}: {found[0]!r} is fetched from another host; keep a copy in docs/assets")
    return output
