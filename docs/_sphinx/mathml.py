"""Formulas as MathML, which browsers draw themselves: no script is loaded."""

from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx


def _draw(translator: Any, node: nodes.Node, block: bool) -> None:
    translator.body.append(tex2mathml(node.astext(), as_block=block))
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    """Take over formulas in HTML."""
    app.add_html_math_renderer(
        "mathml",
        inline_renderers=(lambda translator, node: _draw(translator, node, block=False), None),
        block_renderers=(lambda translator, node: _draw(translator, node, block=True), None),
    )
    app.config.html_math_renderer = "mathml"
    return {"parallel_read_safe": True, "parallel_write_safe": True}
