"""Check the project on a GPU in at most 9 minutes, without a network.

    make gpu PYTHON=python3.12                 # a Python that has torch with CUDA
    make gpu PYTHON=python3 SOURCE=horovod-0.28.1.tar.gz OUT=results
    python tests/gpu/kit.py --device cpu       # a rehearsal without a GPU, with small models

Builds Horovod with NCCL beside that Python, without installing it; its source is the archive that
`make setup` keeps, or SOURCE. Then each part of `parts.py` runs in a process of its own with a time
limit, and a part that fails does not stop the others. The exit code is 0 when all of them ran and
held. What was measured goes to a JSON file and a table, named after the card and the date, in OUT
(default runs/gpu), with the logs beside them.

Nothing is downloaded. Where packages are missing they can lie in a folder named by PYTHONPATH.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
HAS_BUILD = """
import pathlib, sys
from horovod_lm.setup.toolchain import inspect_toolchain
key = inspect_toolchain(mpi=False, nccl=sys.argv[2] == "--nccl").key
sys.exit(not any(pathlib.Path(sys.argv[1]).glob(f"horovod-*lm.{key}.dist-info")))
"""
SECONDS = {"cuda": 540, "cpu": 120}
# What `horovod_lm.train` and Horovod import, as pip names it: module.
MODEL = {"torch": "torch", "numpy": "numpy"}
TRAIN = MODEL | {"pydantic": "pydantic", "PyYAML": "yaml", "filelock": "filelock"}
HOROVOD = {"torch": "torch", "cffi": "cffi", "cloudpickle": "cloudpickle", "psutil": "psutil",
           "packaging": "packaging", "PyYAML": "yaml"}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """One function of parts.py."""

    name: str
    seconds: float
    needs: dict[str, str]
    horovod: bool = False
    optional: bool = False


# By importance; the first five run while Horovod is compiled.
PARTS = [
    Part("logits", 60, MODEL),
    Part("loss_in_pieces", 60, MODEL),
    Part("gradient_checkpointing", 60, MODEL),
    Part("cached_generation", 60, MODEL),
    Part("resume", 90, TRAIN),
    Part("collectives", 90, HOROVOD, horovod=True),
    Part("two_ranks", 180, TRAIN | HOROVOD, horovod=True),
    Part("speed", 90, MODEL, optional=True),
]


class Kit:
    """One run: where its files are, until when it may take, and its rows."""

    def __init__(self, device: str, out: Path, source: Path | None) -> None:
        self.device, self.out, self.source = device, out, source
        self.end = time.monotonic() + SECONDS[device]
        self.work = out / "work"  # logs, data and runs of the last time
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir(parents=True)
        self.horovod = ROOT / "build" / "gpu" / "horovod"  # kept for the next run
        self.rows: list[dict[str, Any]] = []

    def run(self, parts: list[Part]) -> None:
        """Start the build, run the parts, and record a row for each."""
        build = self.start_build() if any(part.horovod for part in parts) else None
        built = ""
        for part in parts:
            if part.horovod and build:
                built, build = self.finish_build(build), None
            missing = [name for name, module in part.needs.items()
                       if importlib.util.find_spec(module) is None]  # fmt: skip
            if missing:
                self.record(part, f"not run: {', '.join(missing)} not installed here")
            elif part.horovod and built:
                self.record(part, f"not run: {built}")
            elif self.seconds_left() < 5:
                self.record(part, "not run: the time is over")
            else:
                self.run_part(part)

    def run_part(self, part: Part) -> None:
        """Run a part in a process of its own, and end what it started when its time is over."""
        started = time.monotonic()
        result = self.work / f"{part.name}.json"
        command = [sys.executable, str(ROOT / "tests/gpu/parts.py"), part.name]
        command += ["--device", self.device, "--work", str(self.work), "--result", str(result)]
        limit = min(part.seconds, self.seconds_left())
        code = self.wait(self.start(command, part.name), limit)
        if result.exists():
            found = json.loads(result.read_text())
            failed = ", ".join(found["failed"])
            said = f"FAILED: {failed}" if failed else "holds"
        else:
            found = {"facts": {}}
            said = f"FAILED: {self.reason(part.name, code, limit)}"
        self.record(part, said, time.monotonic() - started, found["facts"])

    def record(
        self, part: Part, result: str, seconds: float = 0, facts: dict[str, Any] | None = None
    ) -> None:
        """Add a row, and show it at once."""
        row = {"part": part.name, "result": result, "seconds": round(seconds, 1),
               "optional": part.optional, "facts": facts or {}}  # fmt: skip
        self.rows.append(row)
        print(f"{part.name}: {result} ({seconds:.0f} s)", flush=True)

    # ---- the build of Horovod ----------------------------------------------------------------

    def start_build(self) -> subprocess.Popen[bytes] | None:
        """Start the installer; None where the right Horovod is there already."""
        if self.device == "cpu" and importlib.util.find_spec("horovod"):
            return None
        self.end += SECONDS["cuda"] - SECONDS[self.device]
        from torch.version import cuda

        nccl = "--nccl" if cuda else "--no-nccl"
        command = [sys.executable, "-m", "horovod_lm.setup.install_horovod", nccl]
        look = [sys.executable, "-c", HAS_BUILD, str(self.horovod), nccl]
        if self.wait(self.start(look, "look"), 60) == 0:
            print("Horovod: built by an earlier run", flush=True)
            return None
        command += ["--target", str(self.horovod)]
        command += ["--source", str(self.source)] if self.source else []
        self.build_started = time.monotonic()
        return self.start(command, "build")

    def finish_build(self, build: subprocess.Popen[bytes]) -> str:
        """Wait for the installer. Return why there is no Horovod, or nothing."""
        code = self.wait(build, self.seconds_left())
        seconds = time.monotonic() - self.build_started
        result = "holds" if code == 0 else f"FAILED: {self.reason('build', code, seconds)}"
        self.record(Part("build of Horovod", 0, {}), result, seconds)
        return "" if code == 0 else "Horovod was not built"

    # ---- processes ---------------------------------------------------------------------------

    def start(self, command: list[str], name: str) -> subprocess.Popen[bytes]:
        """Start a command in a process group of its own, with its output in a log."""
        places = [str(self.horovod), str(ROOT), os.environ.get("PYTHONPATH", "")]
        env = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, places)),
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # what deterministic algorithms ask for
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"),
        }
        with (self.work / f"{name}.log").open("wb") as log:
            return subprocess.Popen(
                command, cwd=self.work, env=env, stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def wait(self, process: subprocess.Popen[bytes], seconds: float) -> int | None:
        """Return the exit code, or None after ending a process whose time is over."""
        try:
            return process.wait(max(1, seconds))
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                # As Ctrl-C does: horovodrun ends its ranks then, and the installer its compilers.
                os.killpg(process.pid, signal.SIGINT)
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()

    def reason(self, name: str, code: int | None, seconds: float) -> str:
        """Why a process did not end well: its last line, unless its time was over."""
        if code is None:
            return f"not done after {seconds:.0f} s"
        lines = (self.work / f"{name}.log").read_text(errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else f"exit code {code}"

    def seconds_left(self) -> float:
        return self.end - time.monotonic()

    # ---- the report --------------------------------------------------------------------------

    def write(self) -> None:
        """Write the JSON file and the table, and print the table."""
        machine = describe_machine(self.device)
        card = machine["card"].replace(" ", "-").replace("/", "-")
        name = f"gpu-{card}-{date.today()}"
        report = {"date": str(date.today()), **machine, "parts": self.rows}
        (self.out / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
        lines = [", ".join(f"{key} {value}" for key, value in machine.items()), ""]
        lines += ["| part | result | seconds | measured |", "|---|---|---|---|"]
        for row in self.rows:
            facts = "; ".join(f"{key}: {shown(value)}" for key, value in row["facts"].items())
            lines.append(f"| {row['part']} | {row['result']} | {row['seconds']} | {facts} |")
        (self.out / f"{name}.md").write_text("\n".join(lines) + "\n")
        print("\n" + "\n".join(lines) + f"\n\nwritten: {self.out / name}.json and .md")
        print(f"logs: {self.work}")

    def passed(self) -> bool:
        """Whether every part held; an optional one may lack what it needs."""
        return all(
            row["result"] == "holds" or (row["optional"] and row["result"].startswith("not run"))
            for row in self.rows
        )


def shown(value: Any) -> str:
    """A fact as the table shows it."""
    if isinstance(value, dict):
        return f"{value['value']:.1e} (at most {value['at_most']:.0e})"
    return ("no", "yes")[value] if isinstance(value, bool) else str(value)


def describe_machine(device: str) -> dict[str, str]:
    """What the figures belong to."""
    import torch

    machine = {"card": "CPU", "torch": torch.__version__, "Python": platform.python_version()}
    if device == "cuda":
        machine["card"] = torch.cuda.get_device_name(0)
        machine["cards"] = str(torch.cuda.device_count())
        machine["CUDA"] = str(torch.version.cuda)
        machine["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            said = subprocess.run(query, capture_output=True, text=True).stdout.split()
            machine["driver"] = said[0] if said else "unknown"
        except OSError:
            machine["driver"] = "unknown (no nvidia-smi)"
    return machine


def why_no_gpu() -> str | None:
    """Why nothing can run on a GPU here, in a sentence, or None."""
    if importlib.util.find_spec("torch") is None:
        return f"{sys.executable} has no torch; name a Python that has: make gpu PYTHON=..."
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} of {sys.executable} is built without CUDA"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} of {sys.executable} finds no NVIDIA GPU here"
    return None


def main() -> int:
    """Run the kit; see the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help="default: all of parts.py")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--source", type=Path, help="horovod-0.28.1.tar.gz (default: kept one)")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu", help="for the report")
    arguments = parser.parse_args()
    unknown = set(arguments.parts) - {part.name for part in PARTS}
    if unknown:
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    problem = why_no_gpu() if arguments.device == "cuda" else None
    if problem:
        print(f"error: {problem}; --device cpu rehearses without a GPU", file=sys.stderr)
        return 1
    # A shell starts its background jobs with SIGINT ignored, and the parts would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    source = arguments.source.absolute() if arguments.source else None
    kit = Kit(arguments.device, arguments.out.absolute(), source)
    kit.run([part for part in PARTS if not arguments.parts or part.name in arguments.parts])
    kit.write()
    return 0 if kit.passed() else 1


if __name__ == "__main__":
    sys.exit(main())
