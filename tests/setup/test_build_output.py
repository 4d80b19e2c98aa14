"""A build: its percentage, its log, and what is shown of its errors."""

from __future__ import annotations

import io
import os
import re
import shutil
import sys
import time

import psutil
import pytest

from horovod_lm.setup.build import explain_failure, run_with_progress
from horovod_lm.utils.errors import UserError
from tests.conftest import alive

BUILD = """
import sys
print("  Running CMake in build/temp:")
for percent in (2, 1, 5, 12, 14, 100):
    print(f"  [{percent:3d}%] Building CXX object CMakeFiles/some.dir/file.cc.o")
sys.exit(int(sys.argv[1]))
"""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(code: int, log, stream) -> None:
    command = [sys.executable, "-c", BUILD, str(code)]
    run_with_progress(command, env={}, log=log, title="Horovod", stream=stream)


def test_a_file_gets_a_line_for_each_tenth(tmp_path):
    stream = io.StringIO()
    run(0, tmp_path / "log", stream)
    shown = re.sub(r" after \d+m\d\ds", "", stream.getvalue()).splitlines()
    assert shown == [
        "  Horovod: 2 % compiled",
        "  Horovod: 12 % compiled",
        "  Horovod: 100 % compiled",
        "  Horovod: built",
    ]
    assert len((tmp_path / "log").read_text().splitlines()) == 7


def test_a_terminal_gets_one_line_that_changes_and_never_falls(tmp_path):
    stream = Terminal()
    run(0, tmp_path / "log", stream)
    assert stream.getvalue().count("\n") == 1
    percents = [
        int(found) for found in re.findall(r"\r\x1b\[K  Horovod: (\d+) %", stream.getvalue())
    ]
    assert percents == [2, 5, 12, 14, 100]


def test_a_real_compiler_s_error_is_shown_whole(tmp_path):
    compiler = shutil.which("c++") or pytest.skip("no C++ compiler")
    name = "a_folder_with_a_long_name_" * 8
    source = tmp_path / name / "error.cc"
    source.parent.mkdir()
    source.write_text("struct span { const int count; };\nvoid f(span s) {\n  s.count = 1;\n}\n")
    call = f"echo '[ 10%] Building CXX object error.cc.o -Wno-error=x'; {compiler} -c '{source}'"
    with pytest.raises(UserError) as error:
        run_with_progress(["sh", "-c", call], {"PATH": "/usr/bin:/bin"}, tmp_path / "log", "x",
                          io.StringIO())  # fmt: skip
    said, advice = str(error.value).split("What to do: ")
    assert f"{source}:3:" in said and "s.count = 1;" in said and "^" in said
    assert "error.cc.o" not in said
    assert f"The full log: {tmp_path / 'log'}" in advice


@pytest.mark.parametrize(
    ("lines", "cure"),
    [
        ("/usr/bin/ld: final link failed: No space left on device", "HOROVOD_LM_CACHE"),
        ("c++: fatal error: Killed signal terminated program cc1plus", "--jobs 1"),
        ("x.h:12:10: fatal error: Python.h: No such file or directory", "python3-dev"),
        ("CMake Error at FindPackage.cmake:165 (message):\n  Could NOT find NCCL", "--no-nccl"),
        ("CMake Error at FindMPI.cmake:1 (message):\n    Could NOT find MPI_CXX", "--mpi"),
        ("c10.h:3:2: error: #error You need C++20 to compile PyTorch", "CXX"),
        ("nvcc fatal   : Unsupported gpu architecture 'compute_50'", "--no-nccl"),
        ("foo.cu(12): error: identifier is undefined", "no fix is known"),
    ],
)
def test_an_error_is_shown_with_what_to_do(tmp_path, lines, cure):
    noise = "\n".join(f"[ {n}%] Building CXX object error{n}.cc.o" for n in range(10, 99))
    (tmp_path / "log").write_text(f"{noise}\n{lines}\n{noise}\n")
    said, advice = explain_failure(tmp_path / "log").split("What to do: ")
    assert all(line.strip() in said for line in lines.splitlines())
    assert "Building" not in said
    assert cure in advice


def test_an_interrupt_ends_every_process_of_the_build(tmp_path):
    class Interrupted(io.StringIO):
        """A stream that stands for Ctrl-C as soon as something is shown."""

        def write(self, text: str) -> int:
            if "compiled" in text:
                raise KeyboardInterrupt
            return super().write(text)

    build = f"sleep 600 & echo $! > {tmp_path}/pid; echo '[ 1%] Building CXX object'; wait"
    with pytest.raises(KeyboardInterrupt):
        run_with_progress(
            ["sh", "-c", build], dict(os.environ), tmp_path / "log", "x", Interrupted()
        )
    sleeper = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 10
    while psutil.pid_exists(sleeper) and alive(psutil.Process(sleeper)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
