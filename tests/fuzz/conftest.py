"""Shared by the fuzz tests: the number of cases, what may be raised, and what may be touched.

Hypothesis draws the same cases in every run. `make test` tries the first of them, `make fuzz` all.
"""

from __future__ import annotations

import copy
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from IPython.core.error import UsageError

from horovod_lm.utils.errors import UserError

FULL = "FUZZ" in os.environ  # set by `make fuzz`
# Events of Python's audit hooks (PEP 578) that start a program, or change what a path names.
STARTS = {"os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.system",
          "socket.connect", "subprocess.Popen"}  # fmt: skip
CHANGES = {"os.chmod", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink",
           "os.truncate"}  # fmt: skip
TO_WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

_folder: str | None = None  # where the watched code may write; None: nothing is watched
_thread = 0
_seen: list[str] = []


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if _folder is None or threading.get_ident() != _thread:
        return
    writes = event in CHANGES or (event == "open" and arguments[2] & TO_WRITE)
    paths = arguments[: 1 if event == "open" else 2] if writes else ()
    outside = [
        path for path in paths
        if isinstance(path, str | bytes | os.PathLike) and not _is_inside(os.fsdecode(path))
    ]  # fmt: skip
    # A run records the platform and the commit.
    starts = event in STARTS and arguments[0] not in ("uname", "git")
    if starts or outside:
        _seen.append(f"{event} {arguments}")
        raise AssertionError(_seen[-1])  # and it is not done


def _is_inside(path: str) -> bool:
    return path == os.devnull or f"{os.path.realpath(path)}{os.sep}".startswith(
        f"{_folder}{os.sep}"
    )


sys.addaudithook(_watch)  # cannot be removed


@contextmanager
def confined(folder: Path) -> Iterator[None]:
    """Fail if the block starts a program, or writes outside `folder`."""
    global _folder, _thread
    _seen.clear()
    _thread, _folder = threading.get_ident(), os.path.realpath(folder)
    try:
        yield
    finally:
        _folder = None
        assert not _seen  # also if the block caught the error


def succeeds_or_explains(folder: Path, call: Callable[..., Any], *arguments: Any) -> Any:
    """Return the result of a call, or None if it raised one sentence for the user."""
    with confined(folder):
        try:
            return call(*arguments)
        except UserError as error:
            text = str(error)
            assert text.strip() and text.isprintable() and "Traceback" not in text
        except UsageError as error:  # IPython's: it repeats the line of a magic
            assert str(error)
    return None


def cases(short: int, full: int = 1000) -> settings:
    """Return the number of cases: `short` in `make test`, `full` in `make fuzz`."""
    return settings(
        max_examples=full if FULL else short,
        derandomize=True,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the files of one case, which the next case overwrites."""
    return tmp_path_factory.mktemp("fuzz")


# ---- damaged and foreign content -----------------------------------------------------------------

NUMBERS = (
    st.integers(-3, 70) | st.sampled_from([2**31, 2**64, -(2**63), 10**25, 10**4000]) | st.floats()
)
TEXTS = st.text(max_size=8) | st.sampled_from(["\ud800", "\0", "a\nb", "${run_name}", "../x", "~"])
SCALARS = st.none() | st.booleans() | NUMBERS | TEXTS
KEYS = TEXTS | st.integers(0, 9) | st.none()
PLAIN = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=6,
)


@st.composite
def damaged(draw: st.DrawFn, content: bytes, pieces: Sequence[bytes] = (b"\0",)) -> bytes:
    """Bytes in which some were replaced, cut out, repeated or inserted."""
    for _ in range(draw(st.integers(1, 5))):
        start, source = (draw(st.integers(0, len(content))) for _ in range(2))
        end = start + draw(st.integers(0, 8) | st.integers(0, len(content)))
        copied = content[source : source + 40]
        new = draw(st.binary(max_size=4) | st.sampled_from([*pieces, copied]))
        content = content[:start] + new + content[end:]
    return content


REMOVED = "REMOVED"
Edits = list[tuple[tuple[Any, ...], Any]]


def edits(content: Any, values: st.SearchStrategy[Any] = PLAIN) -> st.SearchStrategy[Edits]:
    """Up to three changes of nested plain values: where, and the new value or REMOVED."""
    places = list(_places(content))
    where = st.sampled_from([one for one in places if len(one) < 3]) | st.sampled_from(places)
    return st.lists(st.tuples(where, values | st.just(REMOVED)), min_size=1, max_size=3)


def edited(content: Any, changes: Edits) -> Any:
    """Return nested plain values with changes."""
    content = copy.deepcopy(content)
    for (*above, key), value in changes:
        holder = content
        for step in above:
            holder = holder[step] if _has(holder, step) else None
        if value is not REMOVED and (_has(holder, key) or isinstance(holder, dict)):
            holder[key] = value
        elif _has(holder, key):
            del holder[key]
    return content


def _has(holder: Any, key: Any) -> bool:
    if isinstance(holder, list):
        return isinstance(key, int) and key < len(holder)
    return isinstance(holder, dict) and key in holder


def _places(content: Any) -> Iterator[tuple[Any, ...]]:
    keys = content if isinstance(content, dict) else range(len(content))
    for key in keys:
        yield (key,)
        if isinstance(content[key], dict | list):
            yield from ((key, *below) for below in _places(content[key]))
