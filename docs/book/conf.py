"""The pages as a static site: `make book`. Nothing is executed or loaded from a network."""

from __future__ import annotations

import re
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from pygments.lexers import find_lexer_class_by_name
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

ROOT = Path(__file__).parents[2]
HOME = "docs/book/index"

project = "Horovod Transformer Tutorial"
extensions = ["myst_nb"]
root_doc = HOME
include_patterns = ["*.ipynb", "notebooks/*.ipynb", "docs/*.md", f"{HOME}.md"]
exclude_patterns = [".*", "build", "data", "runs", "notebooks/data", "**/.ipynb_checkpoints"]
nitpicky = True

nb_execution_mode = "off"
nb_ipywidgets_js = {}  # a widget is shown by the picture or text below it
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
myst_heading_slug_func = "docs.book.conf.anchor"

html_theme = "furo"
html_title = project
html_math_renderer = "mathml"
html_copy_source = False
html_use_index = False
html_show_sourcelink = False
html_show_copyright = False


def anchor(title: str) -> str:
    """Return the anchor that JupyterLab gives a heading: the pages' contents use it."""
    return title.replace(" ", "-")


class NamesOfFiles(SphinxTransform):
    """Make a link of each inline `code` that names a page or a file of the repository."""

    default_priority = 500

    def apply(self) -> None:
        for code in list(self.document.findall(nodes.literal)):
            name = code.astext()
            fixed = (nodes.title, nodes.reference, addnodes.pending_xref)
            if isinstance(code.parent, fixed) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)*", name):
                continue
            here = Path(self.env.doc2path(self.env.docname)).parent
            file = next(filter(Path.is_file, (here / name, ROOT / name)), None)
            if file is None:
                continue
            path = file.relative_to(ROOT)
            document = path.with_suffix("").as_posix()
            if document in self.env.found_docs:
                link = addnodes.pending_xref(
                    "", refdomain="std", reftype="doc", reftarget=f"/{document}",
                    refexplicit=True, refwarn=True, refdoc=self.env.docname,
                )  # fmt: skip
            else:
                link = addnodes.download_reference("", reftarget=f"/{path.as_posix()}")
            code.replace_self(link)
            link += code


class TextsOfPictures(SphinxTransform):
    """Describe each figure by the text that is stored beside it."""

    default_priority = 500

    def apply(self) -> None:
        for output in self.document.findall(nodes.container):
            if output.get("nb_element") == "mime_bundle":
                forms = {form.get("mime_type"): form for form in output.children}
                if {"image/png", "text/plain"} <= forms.keys():
                    for image in forms["image/png"].findall(nodes.image):
                        image["alt"] = forms["text/plain"].astext()


def formula(self: nodes.NodeVisitor, node: nodes.math | nodes.math_block) -> None:
    """Write a formula as MathML, which browsers show without a script."""
    block = isinstance(node, nodes.math_block)
    mathml = tex2mathml(node.astext(), as_block=block)
    self.body.append(f'<div style="overflow-x: auto">{mathml}</div>' if block else mathml)
    raise nodes.SkipNode


def front_page(app: Sphinx, error: Exception | None) -> None:
    if not error:
        (Path(app.outdir) / "index.html").write_text(
            f'<!doctype html><meta http-equiv="refresh" content="0; url={HOME}.html">'
        )


def setup(app: Sphinx) -> None:
    app.add_lexer("python", find_lexer_class_by_name("ipython3"))  # knows `!command`
    app.add_transform(NamesOfFiles)
    app.add_transform(TextsOfPictures)
    app.add_html_math_renderer("mathml", (formula, None), (formula, None))
    app.connect("build-finished", front_page)
