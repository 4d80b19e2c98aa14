"""Hand out pages without solutions, write pages with solutions, and grade answers.

    python -m horovod_lm.teaching.classroom handout notebooks/*.ipynb --out handout
    python -m horovod_lm.teaching.classroom solutions notebooks/*.ipynb --out solutions
    python -m horovod_lm.teaching.classroom grade handed_in/*.ipynb --csv grades.csv

Everything is made from the course's own pages, in which each exercise is written once (see
exercises.py). Grading copies only the answers from a file into the course's page and runs the
page's checks, so other changes do not matter. It runs the students' code with your permissions.
"""

from __future__ import annotations

import argparse
import copy
import csv
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nbformat import NotebookNode

from horovod_lm.jupyter.exercises import (
    RIGHT,
    SOLUTION,
    STUB_TAG,
    exercises_alone,
    solutions,
    with_solutions,
)
from horovod_lm.teaching.notebooks import (
    MAY_RAISE,
    NotebookError,
    execute,
    for_each,
    read_notebook,
    store,
)
from horovod_lm.utils.cli import run_cli
from horovod_lm.utils.errors import ConfigError, UserError

COURSE = Path("notebooks")  # the pages; the configurations are beside it
CELL_TIMEOUT = 300  # seconds


@dataclass(frozen=True)
class Grade:
    """The result of one exercise's check."""

    exercise: str  # the id of the stub's cell
    right: bool  # whether every check of the exercise passed
    said: str  # the line that the first failing check printed, or the last line


def handout(page: NotebookNode) -> NotebookNode:
    """Return a copy of a page without its solutions.

    Raises:
        ExerciseError: an exercise of the page has no check or no solution.
    """
    solutions(page)
    copied = copy.deepcopy(page)
    for cell in copied.cells:
        cell.source = SOLUTION.sub("", cell.source).strip("\n")
    copied.cells = [cell for cell in copied.cells if cell.source]
    return copied


def with_answers(page: NotebookNode, answers: NotebookNode) -> NotebookNode:
    """Return the exercises of a page with the answers of another notebook in their stubs."""
    given = {cell.id: cell.source for cell in answers.cells}
    alone = exercises_alone(page)
    for stub, check in _exercises(alone):
        stub.source = given.get(stub.id, stub.source)
        for cell in (stub, check):  # an answer that is not Python must not stop the others
            cell.metadata["tags"] = [*cell.metadata.get("tags", []), MAY_RAISE]
    return alone


def grade(page: NotebookNode, answers: NotebookNode) -> list[Grade]:
    """Run a page's checks on the answers in a notebook: a grade per exercise, in order."""
    failure = "the check printed nothing"
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "configs").symlink_to(Path("configs").resolve())
        file, executed = (Path(folder, COURSE, name) for name in ("page.ipynb", "done.ipynb"))
        store(with_answers(page, answers), file)
        try:
            notebook = execute(file, executed, CELL_TIMEOUT, quiet=True)
        except NotebookError as error:  # its last line names the stored notebook
            notebook, failure = read_notebook(executed), str(error).splitlines()[-2]
    return [_judge(stub.id, check, failure) for stub, check in _exercises(notebook)]


def page_of(answers: NotebookNode) -> Path:
    """Return the page whose exercises a notebook answers; the file's name does not matter.

    Raises:
        NotebookError: no page has any of its cells as an exercise.
    """
    cells = {cell.id for cell in answers.cells}
    for path in sorted(COURSE.glob("*.ipynb")):
        if solutions(read_notebook(path)).keys() & cells:
            return path
    raise NotebookError(
        f"no page in {COURSE} has the exercises of this notebook: run it in the project's folder"
    )


def _exercises(notebook: NotebookNode) -> list[tuple[NotebookNode, NotebookNode]]:
    """Return the stub of each exercise and the check below it."""
    pairs = zip(notebook.cells, notebook.cells[1:], strict=False)
    return [pair for pair in pairs if STUB_TAG in pair[0].metadata.get("tags", [])]


def _judge(exercise: str, check: NotebookNode, failure: str) -> Grade:
    """Read what a check printed; `failure` is why it may have printed nothing."""
    printed = "".join(output.get("text", "") for output in check.outputs).splitlines()
    errors = [output for output in check.outputs if output.output_type == "error"]
    printed += [f"not yet: {error.ename}: {error.evalue}" for error in errors]
    printed = printed or [f"not yet: {failure}"]
    wrong = [line for line in printed if not line.startswith(RIGHT)]
    return Grade(exercise, not wrong, [*wrong, printed[-1]][0])


def _grade_all(files: Sequence[Path], table: Path | None) -> None:
    """Grade every file that can be graded, and write each row as soon as it is known."""
    try:
        # Line-buffered: an interrupt loses no row.
        stream = open(table or os.devnull, "w", 1, encoding="utf-8", newline="")
    except OSError as error:
        raise ConfigError(f"--csv {table} cannot be written: {error.strerror}") from None
    with stream:
        rows = csv.writer(stream)
        rows.writerow(("file", "page", "exercise", "right", "said"))
        for file in files:
            try:
                answers = read_notebook(file)
                path = page_of(answers)
                grades = grade(read_notebook(path), answers)
            except (UserError, OSError) as error:
                print(f"{file}: not graded: {error}")
                rows.writerow((file, "", "", 0, error))
                continue
            print(f"{file}: {sum(one.right for one in grades)} of {len(grades)} ({path.name})")
            for one in grades:
                print(f"  {one.exercise}: {one.said}")
                rows.writerow((file, path.name, one.exercise, int(one.right), one.said))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m horovod_lm.teaching.classroom",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("action", choices=("handout", "solutions", "grade"))
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to write the pages")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write a row per graded exercise")
    arguments = parser.parse_args(argv)
    if arguments.action == "grade":
        _grade_all(arguments.files, arguments.csv)
        return 0
    if arguments.out is None:
        parser.error(f"{arguments.action} needs --out FOLDER")
    change = handout if arguments.action == "handout" else with_solutions

    def write(path: Path) -> None:
        target = arguments.out / path.name
        if target.resolve() == path.resolve():
            raise NotebookError(f"{path} would be overwritten: choose another --out")
        store(change(read_notebook(path)), target)
        print(target)

    return for_each(arguments.files, write)


if __name__ == "__main__":
    run_cli(main)
