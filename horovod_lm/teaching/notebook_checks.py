"""What a stored notebook must be: executed, free of errors and private paths, with its contents."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from nbformat import NotebookNode

TOC_START, TOC_STOP = "<!-- toc -->", "<!-- tocstop -->"
MAY_RAISE = "raises-exception"  # the tag of a cell that shows an error on purpose
_FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^(#{1,6}) +(.+?)\s*$", re.MULTILINE)
# A folder of somebody's machine: no reader has it.
_PRIVATE_PATH = re.compile(r"(?<![\w.])/(?:home|Users|root|tmp|private|mnt|work\w*)/[\w.-]+")


def headings(notebook: NotebookNode) -> list[tuple[int, int, str]]:
    """Return every heading: the index of its cell, its level from 1, its text."""
    return [
        (index, len(marks), text)
        for index, cell in enumerate(notebook.cells)
        if cell.cell_type == "markdown"
        for marks, text in _HEADING.findall(_FENCED.sub("", cell.source))
    ]


def table_of_contents(notebook: NotebookNode) -> str:
    """Return the lines that link to every heading below the title."""
    below = [
        (level, text)
        for index, level, text in headings(notebook)
        # The heading that the list itself stands under is not worth a link.
        if level > 1 and TOC_START not in notebook.cells[index].source
    ]
    return "\n".join(f"{'  ' * (level - 2)}- [{text}](#{anchor(text)})" for level, text in below)


def anchor(heading: str) -> str:
    """Return what a link calls a heading: its words as Jupyter shows them, dashes for spaces."""
    return re.sub("[`*]", "", heading).replace(" ", "-")


def renew_table_of_contents(notebook: NotebookNode) -> None:
    """Write the table of contents between its two marks, where a cell has them."""
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and TOC_START in cell.source and TOC_STOP in cell.source:
            before, rest = cell.source.split(TOC_START, 1)
            after = rest.split(TOC_STOP, 1)[1]
            contents = table_of_contents(notebook)
            cell.source = f"{before}{TOC_START}\n{contents}\n{TOC_STOP}{after}"


def find_problems(notebook: NotebookNode) -> list[str]:
    """Return what is wrong with a stored notebook, a sentence each; empty: nothing."""
    return [*_not_executed(notebook), *_errors(notebook), *_leaks(notebook), *_structure(notebook)]


def _code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


def _not_executed(notebook: NotebookNode) -> Iterator[str]:
    for number, cell in enumerate(_code_cells(notebook), start=1):
        if cell.execution_count != number:
            yield f"cell {cell.id} is number {number} but was executed as {cell.execution_count}"


def _errors(notebook: NotebookNode) -> Iterator[str]:
    for cell in _code_cells(notebook):
        if MAY_RAISE not in cell.metadata.get("tags", []):
            for output in cell.outputs:
                if output.output_type == "error":
                    yield f"cell {cell.id} holds an error: {output.ename}: {output.evalue}"


def _leaks(notebook: NotebookNode) -> Iterator[str]:
    for cell in notebook.cells:
        texts = [cell.source] + [_text_of(output) for output in cell.get("outputs", [])]
        for path in sorted({path for text in texts for path in _PRIVATE_PATH.findall(text)}):
            yield f"cell {cell.id} names a folder of one machine: {path}"


def _text_of(output: NotebookNode) -> str:
    data = {kind: value for kind, value in output.get("data", {}).items() if "image" not in kind}
    return output.get("text", "") + json.dumps(data) + "\n".join(output.get("traceback", []))


def _structure(notebook: NotebookNode) -> Iterator[str]:
    levels = [level for _, level, _ in headings(notebook)]
    if levels.count(1) != 1 or levels[0] != 1:
        yield "it must begin with its title, the only heading of level 1"
    if any(below > above + 1 for above, below in zip(levels, levels[1:], strict=False)):
        yield "its headings skip a level"
    for cell in notebook.cells:
        if TOC_START in cell.source and table_of_contents(notebook) not in cell.source:
            yield "its table of contents is not up to date: execute it again"
