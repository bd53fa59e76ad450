"""Directives of the chapters: source code by name, and interactive figures.

A name that no longer exists, or a figure without its file, is a warning, and docs/build.sh ends at a warning.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import TYPE_CHECKING

from docutils import nodes
from docutils.parsers.rst import Directive

if TYPE_CHECKING:
    from sphinx.application import Sphinx

DOCS = Path(__file__).parent
PACKAGE = DOCS.parent / "minimind_mcore"


def source_of(name: str) -> tuple[str, str]:
    """Return the path in the package and the source of `module:function` or `module:Class.method`.

    Raises:
        LookupError: the name does not exist.
    """
    module, _, wanted = name.partition(":")
    file = PACKAGE / f"{module.replace('.', '/')}.py"
    if not file.is_file():
        raise LookupError(f"the excerpt {name}: the file {file.name} does not exist")
    text = file.read_text(encoding="utf-8")
    node: ast.AST = ast.parse(text)
    for part in wanted.split("."):
        found = [child for child in ast.iter_child_nodes(node) if _name(child) == part]
        if not found:
            raise LookupError(f"the excerpt {name}: {file.name} has no {part}")
        node = found[-1]
    first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
    lines = text.splitlines()[first - 1 : node.end_lineno]
    indent = len(lines[0]) - len(lines[0].lstrip())
    return f"minimind_mcore/{module.replace('.', '/')}.py", "\n".join(line[indent:] for line in lines)


def _name(node: ast.AST) -> str | None:
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
        return node.targets[0].id
    return getattr(node, "name", None)


class Excerpt(Directive):
    """The source of each `module:function` in the content, folded."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        made: list[nodes.Node] = []
        for name in self.content:
            try:
                path, text = source_of(name)
            except LookupError as error:
                made.append(self.state.document.reporter.warning(str(error), line=self.lineno))
                continue
            made.append(
                nodes.raw(
                    "",
                    f'<details class="excerpt"><summary><code>{path}: {name.partition(":")[2]}</code></summary>',
                    format="html",
                )
            )
            made.append(nodes.literal_block(text, text, language="python"))
            made.append(nodes.raw("", "</details>", format="html"))
        return made


class Figure(Directive):
    """An interactive figure: the widget of this name, with the JSON file of this name in the page."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        name = self.arguments[0]
        file = DOCS / "figures" / f"{name}.json"
        if not file.is_file():
            return [self.state.document.reporter.warning(f"figure {name}: there is no {file.name}", line=self.lineno)]
        data = file.read_text(encoding="utf-8").replace("</", "<\\/")
        html = (
            f'<div class="figure-widget" data-figure="{name}"><noscript>This figure needs JavaScript. '
            "这幅图需要 JavaScript。</noscript></div>"
            f'<script type="application/json" id="figure-{name}">{data}</script>'
        )
        return [nodes.raw("", html, format="html")]


def setup(app: Sphinx) -> None:
    """Register the directives, and load the widgets on the pages that have one."""
    app.add_directive("excerpt", Excerpt)
    app.add_directive("widget", Figure)
    app.connect("html-page-context", _load)


def _load(app: Sphinx, page: str, template: str, context: dict[str, object], doctree: nodes.document | None) -> None:
    if doctree is not None and "data-figure=" in "".join(raw.astext() for raw in doctree.findall(nodes.raw)):
        app.add_js_file("learn.js", loading_method="defer")
        app.add_css_file("learn.css")
