"""A check says what is wrong in one sentence, and a notebook holds the solution of each stub."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from horovod_lm.jupyter.exercises import ExerciseError, check, solutions, with_solutions
from horovod_lm.teaching.notebooks import execute, store

STUB = "def double(x):\n    ..."
CHECK = (
    "import torch\nfrom horovod_lm.jupyter.exercises import check\n"
    'check("double(x)", double, lambda x: 2 * x, [(torch.ones(2, 3),), (3,)])'
)
SOLUTION = (
    "<details><summary>Solution</summary>\n\n```python\n"
    "def double(x):\n    return x + x\n```\n\n</details>"
)


def page(*below: str):
    cells = [new_code_cell(STUB, id="double", metadata={"tags": ["exercise"]})]
    for number, source in enumerate(below):
        new_cell = new_markdown_cell if source.startswith("<") else new_code_cell
        cells.append(new_cell(source, id=f"below-{number}"))
    return new_notebook(cells=cells)


def said(capsys, *arguments) -> str:
    check("it", *arguments)
    return capsys.readouterr().out.strip()


@pytest.mark.parametrize(
    "value", [3, 2.5, "word", True, [1, [2]], torch.eye(2), torch.tensor([True, False])]
)
def test_a_value_is_right_by_itself_and_not_yet_when_it_is_unfinished(value, capsys):
    assert said(capsys, value, value) == "right: it"
    assert said(capsys, None, value) == "not yet: it is still None"


@pytest.mark.parametrize(
    ("given", "expected", "sentence"),
    [
        (torch.ones(2, 3), torch.ones(3, 2), "has shape (2, 3), and must have (3, 2)"),
        (
            torch.tensor([[1.0, 2.0], [3.0, 5.0]]),
            torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
            "is 5 at [1, 1], and must be 4 (1 of 4 numbers differ)",
        ),
        (
            torch.tensor([0.0, 2.0]),
            torch.tensor([0.0, 4.0]),
            "is 2 at [1], and must be 4 (1 of 2 numbers differ): 0.5 times the right numbers",
        ),
        (torch.eye(2), torch.eye(2) > 0, "has the type torch.float32, and must have torch.bool"),
        ([1.0], torch.ones(1), "must be a tensor, and is of type list"),
        ([1, 2], [1, 3], "at [1] is 2, and must be 3"),
        ({"a": 1, "b": 3}, {"b": 2}, "b is 3, and must be 2"),
        ([1], [1, 3], "must have 2 items, and is [1]"),
        ("three", 3, "is 'three', and must be 3"),
        (0.5, 0.25, "is 0.5, and must be 0.25: 2 times the right number"),
    ],
)
def test_the_first_difference_is_named(given, expected, sentence, capsys):
    assert said(capsys, given, expected) == f"not yet: it {sentence}"


def test_a_function_that_raises_or_is_none_is_an_answer_like_any_other(capsys):
    examples = [(1, 0)]
    assert said(capsys, lambda a, b: a / b, lambda a, b: a, examples) == (
        "not yet: it raises ZeroDivisionError for (1, 0): division by zero"
    )
    assert said(capsys, 7, lambda a, b: a, examples).endswith(
        "must be a function, and is of type int"
    )


def test_a_known_mistake_is_answered_with_its_question(capsys):
    mistakes = {"Is it the sum?": lambda a, b: a + b, "Is it the product?": lambda a, b: a * b}
    arguments = (lambda a, b: a / b, [(6, 3), (2, 2)], mistakes)
    assert said(capsys, lambda a, b: b + a, *arguments).endswith(". Is it the sum?")
    assert "?" not in said(capsys, lambda a, b: a - b, *arguments)


def test_what_an_answer_writes_into_its_arguments_does_not_reach_the_next_check(capsys):
    shared = torch.zeros(2)
    assert said(capsys, lambda x: x.add_(1), lambda x: x + 1, [(shared,)]) == "right: it"
    assert shared.tolist() == [0, 0]


def test_a_solution_in_its_stubs_place_is_right_and_the_stub_is_not(tmp_path):
    notebook = page(CHECK, SOLUTION)
    for cells, verdict in ((notebook, "not yet:"), (with_solutions(notebook), "right:")):
        store(cells, tmp_path / "page.ipynb")
        executed = execute(tmp_path / "page.ipynb", tmp_path / "executed.ipynb")
        assert executed.cells[1].outputs[0].text.startswith(verdict)
    assert notebook.cells[0].source == STUB


@pytest.mark.parametrize("below", [(), (CHECK,), (SOLUTION, CHECK), ("print()", SOLUTION)])
def test_a_stub_without_its_check_or_its_solution_is_an_error(below):
    with pytest.raises(ExerciseError, match="exercise double"):
        solutions(page(*below))


def test_a_page_that_checks_an_answer_does_not_wait_for_the_notebook_format():
    code = "import sys, horovod_lm.jupyter.exercises; assert 'nbformat' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
