"""Formulas as MathML, made when the site is built: browsers set them without a script and without a network.

Pages hold LaTeX between dollar signs, as code hosts read it; Arithmatex finds it there and leaves it as LaTeX.
"""

from __future__ import annotations

import html
import re

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

FORMULA = re.compile(r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<latex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL)
BAR = re.compile(r"\\([lr])[vV]ert(?![a-zA-Z])")
SIDES = {"l": "left", "r": "right"}
"""latex2mathml knows on which side a bar stands, and so where space belongs, only behind these commands."""


def mathml(latex: str, display: str) -> str:
    """A formula of LaTeX as MathML; ``display`` is "inline" or "block".

    Raises:
        ValueError: the formula uses a command that has no MathML here.
    """
    from latex2mathml.converter import convert

    made = convert(BAR.sub(lambda bar: rf"\{SIDES[bar[1]]}{bar[0]}", latex), display=display)
    unknown = re.search(r"\\\w*", html.unescape(made))  # what latex2mathml does not know it leaves as it is
    if unknown:
        raise ValueError(f"{unknown[0]} is not known to latex2mathml")
    return made


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put MathML in the place of every formula.

    Raises:
        PluginError: a formula cannot be read.
    """

    def typeset(formula: re.Match[str]) -> str:
        latex, is_inline = html.unescape(formula["latex"]).strip(), formula["tag"] == "span"
        try:
            made = mathml(latex, "inline" if is_inline else "block")
        except Exception as error:  # latex2mathml's errors have no class in common
            raise PluginError(f"{page.file.src_uri}: the formula {latex!r} is not understood: {error!r}") from error
        return made if is_inline else f'<div class="formula">{made}</div>'  # which scrolls on a phone

    return FORMULA.sub(typeset, content)
