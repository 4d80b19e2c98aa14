"""What must be changed in Horovod's last release before it builds and works today.

Horovod 0.28.1 (June 2023) is the newest release. Its source is pinned here by version and hash,
and the repairs below fit that source only: each names the text it expects to find, and a source
that says anything else is refused rather than half repaired. That is why the pin stands here,
beside the repairs, and not among the dependencies in pyproject.toml.

Some of the repairs restore behaviour that fails in silence (a hang that nobody reports, a network
interface that is ignored, a background thread that burns a core) or that elastic training needs (a
process that starts Horovod a second time); `tests/horovod` and `tests/test_train_elastic.py` show
them working on real processes.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from horovod_lm.utils.errors import UserError

HOROVOD_VERSION = "0.28.1"
SDIST_SHA256 = "92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0"


@dataclass(frozen=True)
class Repair:
    """One change to one file of Horovod's source.

    Attributes:
        name: what to call it, in a log and in a test.
        file: the file, relative to the root of the source distribution.
        says: the text that is wrong; it must occur in the file exactly once.
        must_say: the text that takes its place.
        why: what goes wrong without the repair.
        upstream: where Horovod's own project speaks of it, or "none found".
    """

    name: str
    file: str
    says: str
    must_say: str
    why: str
    upstream: str


REPAIRS = (
    Repair(
        name="C++17 for the library",
        file="CMakeLists.txt",
        says="set(CMAKE_CXX_STANDARD 14)\nset(CMAKE_CXX_STANDARD_REQUIRED ON)",
        must_say="set(CMAKE_CXX_STANDARD 17)\nset(CMAKE_CXX_STANDARD_REQUIRED ON)",
        why="since 2.1, torch's headers refuse to be compiled as C++14",
        upstream="horovod#3996, horovod#3998 (merged, never released)",
    ),
    Repair(
        name="C++17 for the torch extension",
        file="horovod/torch/CMakeLists.txt",
        says="    set(CMAKE_CXX_STANDARD 14)",
        must_say="    set(CMAKE_CXX_STANDARD 17)",
        why="the extension sets the standard again for itself, and includes the same headers",
        upstream="horovod#3996, horovod#3998 (merged, never released)",
    ),
    Repair(
        name="Python's headers without distutils",
        file="horovod/torch/CMakeLists.txt",
        says="from distutils.sysconfig import get_python_inc; print(get_python_inc())",
        must_say="import sysconfig; print(sysconfig.get_path('include'))",
        why="Python 3.12 has no distutils: the path comes back empty, and Python.h is not found",
        upstream="none released",
    ),
    Repair(
        name="horovodrun without distutils: the import",
        file="horovod/runner/js_run.py",
        says="from distutils.spawn import find_executable",
        must_say="from shutil import which",
        why="Python 3.12 has no distutils: horovodrun cannot even be imported",
        upstream="none released",
    ),
    Repair(
        name="horovodrun without distutils: the call",
        file="horovod/runner/js_run.py",
        says="find_executable('jsrun')",
        must_say="which('jsrun')",
        why="the other half of the repair above",
        upstream="none released",
    ),
    Repair(
        name="stall check sees the ranks",
        file="horovod/common/gloo/gloo_controller.cc",
        says="  global_ranks_.reserve(size_);",
        must_say="  global_ranks_.resize(size_);",
        why="the list of ranks is filled through its pointer but stays empty, so the stall check"
        " finds nobody missing: under Gloo one absent rank hangs the job for ever",
        upstream="none found",
    ),
    Repair(
        name="process sets use the chosen interface",
        file="horovod/common/gloo/gloo_context.cc",
        says="  }\n\n  attr device_attr;\n  device_attr.iface = gloo_iface_;",
        must_say="  }\n\n  gloo_iface_ = global_context.gloo_iface_;\n"
        "  attr device_attr;\n  device_attr.iface = gloo_iface_;",
        why="the interface of a process set is never filled in, so Gloo listens wherever the"
        " host's name points: `hvd.init()` aborts on several hosts whose names resolve to 127.x",
        upstream="none found",
    ),
    Repair(
        name="a stop reaches the rank before the freeze",
        file="horovod/runner/common/util/safe_shell_exec.py",
        says="    # Terminate children gracefully.\n    for child in p.children():",
        must_say="    # Terminate children gracefully.\n"
        "    if p.name() not in ('sh', 'dash', 'bash', 'zsh', 'ksh', 'ash', 'busybox'):\n"
        "        p.terminate()\n"
        "        psutil.wait_procs([p], timeout=GRACEFUL_TERMINATION_TIME_S)\n"
        "        if not p.is_running():\n"
        "            return\n"
        "    for child in p.children():",
        why="bash, which is /bin/sh on many systems, puts the rank in its own place: the rank is"
        " then taken for the shell and frozen at once, so that on Ctrl-C it cannot save anything",
        upstream="none found",
    ),
    Repair(
        name="horovod.run's cycle time is a number",
        file="horovod/runner/__init__.py",
        says="        self.cycle_time_ms = None,\n",
        must_say="        self.cycle_time_ms = None\n",
        why='a comma makes it a tuple, exported as HOROVOD_CYCLE_TIME="(None,)" and read as zero:'
        " the background thread of an idle rank polls without a pause and burns half a core",
        upstream="none found",
    ),
    Repair(
        name="horovod.run's cache capacity is a number",
        file="horovod/runner/__init__.py",
        says="        self.cache_capacity = None,\n",
        must_say="        self.cache_capacity = None\n",
        why="the same comma; read as zero, it turns the response cache off",
        upstream="none found",
    ),
    Repair(
        name="settings outlive a second init",
        file="horovod/common/parameter_manager.cc",
        says="  } else {\n    Eigen::VectorXd v = TunableParameter::BestValue();",
        must_say="  } else if (fixed_values_.find(variable) == fixed_values_.end()) {\n"
        "    Eigen::VectorXd v = TunableParameter::BestValue();",
        why="with cycle time and fusion threshold set, their defaults are written into a vector"
        " that no longer holds them: every second `hvd.init()` of a process, and so every elastic"
        " reset, ends in a segmentation fault; with one of them set, the other changes in silence",
        upstream="horovod#2835 (open)",
    ),
    Repair(
        name="a failing init raises: its beginning",
        file="horovod/common/operations.cc",
        says="#if HAVE_GLOO\n#if HAVE_MPI\n  if (global_mpi_context.IsEnabled()) {\n"
        "    // Initialize gloo",
        must_say="#if HAVE_GLOO\n  try {\n#if HAVE_MPI\n  if (global_mpi_context.IsEnabled()) {\n"
        "    // Initialize gloo",
        why="an error while the ranks meet ends the process by SIGABRT: a rank that dies while"
        " elastic training recovers takes all the others with it",
        upstream="horovod#3264 (closed, not mended)",
    ),
    Repair(
        name="a failing init raises: its end",
        file="horovod/common/operations.cc",
        says="    state.process_set_table.Initialize(global_gloo_context);\n  }\n"
        "#endif // HAVE_GLOO\n\n  assert(",
        must_say="    state.process_set_table.Initialize(global_gloo_context);\n  }\n"
        "  } catch (const std::exception& ex) {\n"
        '    LOG(ERROR) << "Horovod could not be initialized: " << ex.what();\n'
        "    state.process_set_table.Get(0).Finalize(SHUT_DOWN_ERROR);\n"
        "    global_gloo_context.Finalize();\n"
        "    state.initialization_failed = true;\n"
        "    return;\n"
        "  }\n"
        "#endif // HAVE_GLOO\n\n  assert(",
        why="the other half of the repair above",
        upstream="horovod#3264 (closed, not mended)",
    ),
    Repair(
        name="init can be tried again",
        file="horovod/common/operations.cc",
        says="    horovod_global.initialization_done = false;\n"
        "    horovod_global.background_thread =",
        must_say="    horovod_global.initialization_done = false;\n"
        "    horovod_global.initialization_failed = false;\n"
        "    horovod_global.background_thread =",
        why="once an init has failed, each later one is taken for failed before it has begun",
        upstream="none found",
    ),
    Repair(
        name="a rank that was removed can tell",
        file="horovod/common/gloo/gloo_context.cc",
        says="      throw std::runtime_error(out.str());",
        must_say='      SetEnv(HOROVOD_RANK, "-1");\n      throw std::runtime_error(out.str());',
        why="a rank whose host left an elastic job only sees that init failed, as when another rank"
        " died: it would ask for a place again and again, and be counted among those that have one",
        upstream="none found",
    ),
    Repair(
        name="a rank may end while horovodrun waits for hosts",
        file="horovod/runner/elastic/registration.py",
        says="        self._action_event.wait()\n",
        must_say="        self._action_event.wait()\n"
        "        if self._driver.finished():\n"
        "            return self._rendezvous_id\n",
        why="fewer ranks than --min-np are left, none joins in time, horovodrun gives up, and then"
        " waits for ever at a barrier for ranks that are gone",
        upstream="horovod#3494 (open)",
    ),
    Repair(
        name="std::logic_error is declared",
        file="horovod/common/common.h",
        says="#include <memory>\n#include <string>\n",
        must_say="#include <memory>\n#include <stdexcept>\n#include <string>\n",
        why="GCC 13 no longer includes <stdexcept> by way of other headers",
        upstream="horovod#3957 (merged, never released)",
    ),
    Repair(
        name="std::string is declared",
        file="horovod/common/group_table.h",
        says="#include <queue>\n#include <unordered_map>\n",
        must_say="#include <queue>\n#include <string>\n#include <unordered_map>\n",
        why="GCC 13 no longer includes <string> by way of other headers",
        upstream="horovod#3957 (merged, never released)",
    ),
    Repair(
        name="uint8_t is declared",
        file="third_party/gloo/gloo/types.h",
        says="#include <iostream>\n",
        must_say="#include <cstdint>\n#include <iostream>\n",
        why="GCC 15 no longer includes <cstdint> by way of other headers",
        upstream="pytorch/gloo#448 (open)",
    ),
)


def apply_repairs(source: Path, repairs: tuple[Repair, ...] = REPAIRS) -> None:
    """Change Horovod's unpacked source in place; change nothing if any repair does not fit.

    Args:
        source: the root of the unpacked source distribution.
        repairs: the rows to apply, in order.

    Raises:
        UserError: a file is missing, or holds the text to repair never or more than once.
    """
    texts: dict[str, str] = {}
    for repair in repairs:
        path = source / repair.file
        if repair.file not in texts:
            if not path.is_file():
                raise UserError(_does_not_fit(repair, "the file is not there"))
            texts[repair.file] = path.read_text(encoding="utf-8")
        found = texts[repair.file].count(repair.says)
        if found != 1:
            raise UserError(_does_not_fit(repair, f"found {found} times, expected once"))
        texts[repair.file] = texts[repair.file].replace(repair.says, repair.must_say)
    for file, text in texts.items():
        (source / file).write_text(text, encoding="utf-8")


def repairs_digest(repairs: tuple[Repair, ...] = REPAIRS) -> str:
    """A short hash that changes when any replacement does: no wheel outlives its table."""
    replacements = [[repair.file, repair.says, repair.must_say] for repair in repairs]
    return hashlib.sha256(json.dumps(replacements).encode()).hexdigest()[:12]


def _does_not_fit(repair: Repair, reason: str) -> str:
    return (
        f"the repair '{repair.name}' does not fit {repair.file}: {reason}; the source is not"
        f" Horovod {HOROVOD_VERSION} as released, and nothing was changed"
    )
