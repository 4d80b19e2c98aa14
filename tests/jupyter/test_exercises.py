"""A check says what is wrong in one sentence, and a notebook holds the solution of each stub."""

from __future__ import annotations

import pytest
import torch
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from horovod_lm.jupyter.exercises import ExerciseError, check, solutions

CHECK = 'check("mine", mine, 2)'
SOLUTION = "<details><summary>Solution</summary>\n\n```python\nmine = 2\n```\n\n</details>"


def page(*below: str):
    cells = [new_code_cell("mine = ...", id="double", metadata={"tags": ["exercise"]})]
    for source in below:
        cells.append((new_markdown_cell if source == SOLUTION else new_code_cell)(source))
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
            torch.eye(2) + 1,
            torch.ones(2, 2),
            "is 2 at [0, 0], and must be 1 (2 of 4 numbers differ)",
        ),
        (
            torch.eye(2),
            2 * torch.eye(2),
            "is 1 at [0, 0], and must be 2 (2 of 4 numbers differ): 0.5 times the right numbers",
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
    arguments = (lambda a, b: a, [(1, 0)])
    raised = "not yet: it raises ZeroDivisionError for (1, 0): division by zero"
    assert said(capsys, lambda a, b: a / b, *arguments) == raised
    assert said(capsys, 7, *arguments) == "not yet: it must be a function, and is of type int"


def test_a_known_mistake_is_answered_with_its_question(capsys):
    mistakes = {"Is it the sum?": lambda a, b: a + b, "Is it the product?": lambda a, b: a * b}
    arguments = (lambda a, b: a / b, [(6, 3), (2, 2)], mistakes)
    assert said(capsys, lambda a, b: b + a, *arguments).endswith(". Is it the sum?")
    assert "?" not in said(capsys, lambda a, b: a - b, *arguments)


def test_what_an_answer_writes_into_its_arguments_does_not_reach_the_next_check(capsys):
    shared = torch.zeros(2)
    assert said(capsys, lambda x: x.add_(1), lambda x: x + 1, [(shared,)]) == "right: it"
    assert shared.tolist() == [0, 0]


def test_the_solution_of_a_stub_is_found_below_its_check():
    assert solutions(page(CHECK, SOLUTION)) == {"double": "mine = 2"}


@pytest.mark.parametrize("below", [(), (CHECK,), (SOLUTION, CHECK), ("print()", SOLUTION)])
def test_a_stub_without_its_check_or_its_solution_is_an_error(below):
    with pytest.raises(ExerciseError, match="exercise double"):
        solutions(page(*below))
