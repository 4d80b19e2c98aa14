"""Self-checking exercises with solutions in the notebook.

An exercise is three cells of a notebook, in this order:

1. a code cell with the tag `exercise`: the stub, whose functions return None until filled in;
2. a code cell that calls `check(...)`, which prints what is wrong and catches the exceptions of the
   reader's code;
3. a markdown cell with `<details><summary>Solution</summary>` around a block of Python.

`with_solutions` replaces each stub by its solution, so that a test can run what readers see. Cells
that an exercise needs have the tag `exercise-needs`, so that it can be run without the other cells.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from horovod_lm.jupyter.run_cell.job_result import RankError
from horovod_lm.utils.errors import UserError

if TYPE_CHECKING:  # nbformat takes seconds to import, and a page does not need it
    from nbformat import NotebookNode

    from horovod_lm.jupyter.live.cluster import HorovodCluster

STUB_TAG = "exercise"
NEEDED_TAG = "exercise-needs"
RIGHT = "right:"
SOLUTION = re.compile(
    r"<details>\s*<summary>Solution</summary>\s*```python\n(.*?)\n```.*?</details>", re.DOTALL
)


class ExerciseError(UserError):
    """An exercise of a notebook lacks its check or its solution."""


class RanksFailed(UserError):
    """An answer hangs or fails on live ranks."""


def check(
    name: str,
    answer: Any,
    reference: Any,
    examples: Iterable[tuple] | None = None,
    mistakes: Mapping[str, Any] | None = None,
) -> None:
    """Print whether an answer is right, or the first difference in one sentence.

    Args:
        name: what to call the answer.
        answer: the reader's value, or with `examples` the reader's function.
        reference: the right value, or a function that returns it. Of a mapping, only the keys that
            this value has are compared.
        examples: the positional arguments of each call to compare; None: compare two values. Each
            function gets a copy, so that changes in place do not affect the other.
        mistakes: a question to print -> the wrong value or function that it is asked for.
    """
    calls = [] if examples is None else [_call(answer, arguments) for arguments in examples]

    def differs(other: Any) -> str:
        return _difference(answer, other) if examples is None else _first_wrong(calls, other)

    if problem := differs(reference):
        questions = [text for text, wrong in (mistakes or {}).items() if not differs(wrong)]
        print(". ".join([f"not yet: {name} {problem}", *questions]))
    else:
        print(f"{RIGHT} {name}")


def on_ranks(cluster: HorovodCluster, answer: Callable[..., Any]) -> Callable[..., dict[str, Any]]:
    """Return a function that calls an answer on live ranks: "on rank 0" -> its value there, ...

    After an answer that hangs or fails, the ranks are started again.
    """

    def call(*arguments: Any) -> dict[str, Any]:
        try:
            values = cluster.run(answer, *arguments)
        except RankError as error:
            cluster.restart_ranks()
            how = "hangs" if error.code is None else "fails"  # only ranks that wait have no code
            # What follows the last ";" says how to start the ranks again.
            raise RanksFailed(f"{how}: {str(error).rpartition('; ')[0]}") from None
        return {f"on rank {rank}": value for rank, value in enumerate(values)}

    return call


def solutions(notebook: NotebookNode) -> dict[str, str]:
    """Return the solution of every exercise by the id of its stub cell.

    Raises:
        ExerciseError: a stub is not followed by its own check and solution.
    """
    cells, found = notebook.cells, {}
    for index, cell in enumerate(cells):
        if STUB_TAG not in cell.metadata.get("tags", []):
            continue
        below = cells[index + 1 : index + 3]
        solution = SOLUTION.search(below[1].source) if len(below) == 2 else None
        if solution is None or "check(" not in below[0].source:
            raise ExerciseError(
                f"exercise {cell.id}: put a cell with check(...) and then one with its"
                " <details><summary>Solution</summary> directly below the stub"
            )
        found[cell.id] = solution[1]
    return found


def with_solutions(notebook: NotebookNode) -> NotebookNode:
    """Return a copy of a notebook with each stub replaced by its solution; see `solutions`."""
    answers, solved = solutions(notebook), copy.deepcopy(notebook)
    for cell in solved.cells:
        cell.source = answers.get(cell.id, cell.source)
    return solved


def exercises_alone(notebook: NotebookNode) -> NotebookNode:
    """Return a copy of a notebook with only its exercises and the cells that they need."""
    stubs, alone, kept = solutions(notebook), copy.deepcopy(notebook), []
    for index, cell in enumerate(alone.cells):
        belongs = {above.id for above in alone.cells[max(0, index - 2) : index + 1]} & stubs.keys()
        if belongs or NEEDED_TAG in cell.metadata.get("tags", []):
            kept.append(cell)
    alone.cells = kept
    return alone


def _call(answer: Any, arguments: tuple) -> tuple[tuple, Any, str]:
    """Call an answer. Return the arguments, its value, and why it has none (or "")."""
    if not callable(answer):
        return arguments, None, f"must be a function, and is of type {type(answer).__name__}"
    try:
        return arguments, answer(*copy.deepcopy(arguments)), ""
    except RanksFailed as error:
        return arguments, None, str(error)
    except Exception as error:  # an exception of the reader's code is a wrong answer
        return arguments, None, f"raises {type(error).__name__}{_example(arguments)}: {error}"


def _first_wrong(calls: Sequence[tuple[tuple, Any, str]], reference: Callable[..., Any]) -> str:
    """Describe the first call that does not give what a function gives; "": there is none."""
    for arguments, given, failure in calls:
        problem = failure or _difference(given, reference(*copy.deepcopy(arguments)))
        if problem:
            return failure or f"{_example(arguments)} {problem}".lstrip()
    return ""


def _example(arguments: tuple) -> str:
    return f" for ({', '.join(map(_describe, arguments))})" if arguments else ""


def _difference(given: Any, expected: Any) -> str:
    """Describe how a value differs from the right one; "": it does not."""
    if given is None and expected is not None:
        return "is still None"
    if isinstance(expected, Mapping) and isinstance(given, Mapping):
        for key, value in expected.items():
            if problem := _difference(given.get(key), value):
                return f"{key} {problem}"
        return ""
    if isinstance(expected, torch.Tensor):
        return _tensor_difference(given, expected)
    if not isinstance(expected, Sequence) or isinstance(expected, str):
        return _scalar_difference(given, expected)
    if not isinstance(given, Sequence) or len(given) != len(expected):
        return f"must have {len(expected)} items, and is {_describe(given)}"
    for number, pair in enumerate(zip(given, expected, strict=True)):
        if problem := _difference(*pair):
            return f"at [{number}] {problem}"
    return ""


def _tensor_difference(given: Any, expected: torch.Tensor) -> str:
    if not isinstance(given, torch.Tensor):
        return f"must be a tensor, and is of type {type(given).__name__}"
    if given.shape != expected.shape:
        return f"has shape {tuple(given.shape)}, and must have {tuple(expected.shape)}"
    if (given.dtype == torch.bool) != (expected.dtype == torch.bool):
        return f"has the type {given.dtype}, and must have {expected.dtype}"
    close = torch.isclose(given.double(), expected.double(), rtol=1e-4, atol=1e-6, equal_nan=True)
    if close.all():
        return ""
    place = tuple((~close).nonzero()[0].tolist())
    at = f" at {list(place)}" if place else ""
    differ = f" ({int((~close).sum())} of {close.numel()} numbers differ)" if place else ""
    numbers = f"is {given[place].item():.5g}{at}, and must be {expected[place].item():.5g}{differ}"
    ratio = given[place].double() / expected[place].double()
    same = torch.isclose(given.double(), ratio * expected.double(), rtol=1e-4, atol=1e-6)
    if not (torch.isfinite(ratio) and ratio and same.all()):
        return numbers
    return f"{numbers}: {ratio.item():.4g} times the right {'numbers' if place else 'number'}"


def _scalar_difference(given: Any, expected: Any) -> str:
    if isinstance(expected, float) and isinstance(given, (int, float, torch.Tensor)):
        # A loss may be a number or a tensor without dimensions.
        return _tensor_difference(torch.as_tensor(given), torch.tensor(expected))
    if type(given) is not type(expected) or given != expected:
        return f"is {_describe(given)}, and must be {_describe(expected)}"
    return ""


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
