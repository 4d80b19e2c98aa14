"""For whoever teaches the course: pages without solutions, pages with them, and answers graded.

    python -m horovod_lm.teaching.classroom handout notebooks/*.ipynb --out handout
    python -m horovod_lm.teaching.classroom solutions notebooks/*.ipynb --out solutions
    python -m horovod_lm.teaching.classroom grade handed_in/*.ipynb --csv grades.csv

All come from the course's own pages, in which every exercise is written once (see exercises.py).
Grading takes nothing but the answers from what is handed in: they are put into the course's page,
and its checks are run, whatever else was changed. It runs the students' code with your rights, and
judges answers, not honesty.
"""

from __future__ import annotations

import argparse
import copy
import csv
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
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
from horovod_lm.teaching.notebook_checks import MAY_RAISE
from horovod_lm.teaching.notebooks import NotebookError, execute, read_notebook, store
from horovod_lm.utils.cli import run_cli
from horovod_lm.utils.progress import ProgressLine

COURSE = Path("notebooks")
SECONDS_FOR_A_CELL = 300


@dataclass(frozen=True)
class Grade:
    """What one exercise's check said of an answer.

    Attributes:
        exercise: the exercise, by the id of its stub's cell.
        right: whether every check below it is satisfied.
        said: the line of the first check that is not, or of the last one.
    """

    exercise: str
    right: bool
    said: str


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


def answered(page: NotebookNode, answers: NotebookNode) -> NotebookNode:
    """Return the exercises of a page, with the answers that another notebook gives to them.

    Args:
        page: the course's page.
        answers: what was handed in; only the cells of exercises are taken from it.
    """
    given = {cell.id: cell.source for cell in answers.cells}
    alone = exercises_alone(page)
    for index, cell in enumerate(alone.cells):
        if STUB_TAG in cell.metadata.get("tags", []):
            cell.source = given.get(cell.id, cell.source)
            # An answer may be no Python at all: the other exercises are graded all the same.
            for judged in alone.cells[index : index + 2]:
                judged.metadata["tags"] = [*judged.metadata.get("tags", []), MAY_RAISE]
    return alone


def grade(page: NotebookNode, answers: NotebookNode, course: Path = COURSE) -> list[Grade]:
    """Run the checks of a page on the answers of a notebook.

    Args:
        page: the course's page.
        answers: what was handed in.
        course: the folder of the course's pages; the configurations lie beside it.

    Returns:
        One grade for each exercise, in the page's order.
    """
    failure = ""
    with tempfile.TemporaryDirectory() as folder:
        inside = Path(folder) / course.name
        inside.mkdir()
        os.symlink((course.parent / "configs").resolve(), Path(folder) / "configs")
        file, done = inside / "page.ipynb", inside / "done.ipynb"
        store(answered(page, answers), file)
        try:
            notebook = execute(file, done, SECONDS_FOR_A_CELL, ProgressLine(enabled=False))
        except NotebookError as error:
            notebook, failure = read_notebook(done), _reason(error)
    cells = notebook.cells
    return [
        _judge(cell.id, cells[index + 1], failure)
        for index, cell in enumerate(cells)
        if STUB_TAG in cell.metadata.get("tags", [])
    ]


def page_of(answers: NotebookNode, course: Path = COURSE) -> Path:
    """Return the page whose exercises a notebook answers, whatever its file is called.

    Raises:
        NotebookError: there is none.
    """
    cells = {cell.id for cell in answers.cells}
    for path in sorted(course.glob("*.ipynb")):
        if solutions(read_notebook(path)).keys() & cells:
            return path
    raise NotebookError(
        f"no page in {course} has these exercises: call it in the course's folder, or say --course"
    )


def _judge(exercise: str, check: NotebookNode, failure: str) -> Grade:
    """Read what a check printed, or say why it printed nothing."""
    lines = "".join(
        output.text for output in check.outputs if output.output_type == "stream"
    ).splitlines()
    errors = [output for output in check.outputs if output.output_type == "error"]
    if errors:
        lines.append(f"not yet: {errors[0].ename}: {errors[0].evalue}")
    if not lines:
        return Grade(exercise, False, f"not yet: {failure or 'the check said nothing'}")
    wrong = [line for line in lines if not line.startswith(RIGHT)]
    return Grade(exercise, not wrong, [*wrong, lines[-1]][0])


def _reason(error: NotebookError) -> str:
    """Return why an execution ended: the last line before the note on where it is stored."""
    return str(error).splitlines()[-2]


def _write(
    pages: Iterable[Path], folder: Path, change: Callable[[NotebookNode], NotebookNode]
) -> None:
    for path in pages:
        target = folder / path.name
        if target.resolve() == path.resolve():
            raise NotebookError(f"{path} would be overwritten: choose another --out")
        store(change(read_notebook(path)), target)
        print(target)


def _grade_all(files: Sequence[Path], course: Path, table: Path | None) -> None:
    rows = []
    for file in files:
        answers = read_notebook(file)
        path = page_of(answers, course)
        grades = grade(read_notebook(path), answers, course)
        print(f"{file}: {sum(one.right for one in grades)} of {len(grades)} ({path.name})")
        for one in grades:
            print(f"  {one.exercise}: {one.said}")
            rows.append((file, path.name, one.exercise, int(one.right), one.said))
    if table is not None:
        with table.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            writer.writerow(("file", "page", "exercise", "right", "said"))
            writer.writerows(rows)


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m horovod_lm.teaching.classroom",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in (
        ("handout", "write pages without their solutions"),
        ("solutions", "write pages whose exercises are solved; execute them to see the outputs"),
    ):
        writing = commands.add_parser(name, help=what)
        writing.add_argument("files", nargs="+", type=Path, metavar="FILE")
        writing.add_argument("--out", required=True, type=Path, metavar="FOLDER")
    grading = commands.add_parser("grade", help="run the course's checks on answers handed in")
    grading.add_argument("files", nargs="+", type=Path, metavar="FILE")
    grading.add_argument(
        "--course", type=Path, default=COURSE, metavar="FOLDER",
        help="where the course's pages are (default: %(default)s)",
    )  # fmt: skip
    grading.add_argument("--csv", type=Path, metavar="FILE", help="write a row for each exercise")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    arguments = build_parser().parse_args(argv)
    if arguments.command == "grade":
        _grade_all(arguments.files, arguments.course, arguments.csv)
    else:
        change = handout if arguments.command == "handout" else with_solutions
        _write(arguments.files, arguments.out, change)
    return 0


if __name__ == "__main__":
    run_cli(main)
