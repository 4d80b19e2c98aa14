"""Check the project on a GPU in at most 9 minutes, without a network.

    make gpu PYTHON=python3.12                 # a Python that has torch with CUDA
    make gpu PYTHON=python3 SOURCE=horovod-0.28.1.tar.gz OUT=results
    python tests/gpu/kit.py --device cpu       # a rehearsal without a GPU, with small models

NANOGPT, the path of nanoGPT's model.py, adds it to the parts about speed; `kit.py speed speed_1024`
measures these alone.

Builds Horovod with NCCL beside that Python, without installing it; its source is the archive that
`make setup` keeps, or SOURCE. Each part of `parts.py` runs in a process of its own with a time
limit, and a part that fails does not stop the others. The exit code is 0 when all of them held. The
measurements go to a JSON file and a table, named after the card and the date, in OUT (default
runs/gpu), with the logs beside them.

Nothing is downloaded. Missing packages can be in a folder named by PYTHONPATH.
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
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from horovod_lm.setup.steps import end_group

ROOT = Path(__file__).resolve().parents[2]
SECONDS = {"cuda": 540, "cpu": 300}
# The parts and their time limits in seconds; the first six run while Horovod is compiled.
PARTS = {
    "logits": 60,
    "chunked_cross_entropy": 60,
    "gradient_checkpointing": 60,
    "cached_generation": 60,
    "resume": 90,
    "asynchronous": 60,
    "collectives": 90,
    "two_ranks": 180,
    "speed": 180,
    "speed_1024": 180,
}
NEED_HOROVOD = ("collectives", "two_ranks")


class Kit:
    """One run: its files, its time limit, and the rows of its report."""

    def __init__(self, device: str, out: Path, source: Path | None) -> None:
        self.device, self.out, self.source = device, out, source
        self.end = time.monotonic() + SECONDS[device]
        self.work = out / "work"  # logs, data and runs
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir(parents=True)
        self.horovod = ROOT / "build" / "gpu" / "horovod"  # kept for the next run
        self.rows: list[dict[str, Any]] = []

    def run(self, parts: dict[str, float]) -> None:
        """Start the build, run the parts, and record a row for each."""
        build = self.start_build() if set(parts) & set(NEED_HOROVOD) else None
        started, is_built = time.monotonic(), True
        try:
            for part, limit in parts.items():
                if part in NEED_HOROVOD and build:
                    code = self.wait(build, self.seconds_left())
                    is_built, build = code == 0, None
                    self.record("build of Horovod", self.result("build", code), started)
                if part in NEED_HOROVOD and not is_built:
                    self.record(part, "not run: Horovod was not built")
                elif self.seconds_left() < 5:
                    self.record(part, "not run: the time is over")
                else:
                    self.run_part(part, min(limit, self.seconds_left()))
        finally:
            if build and build.poll() is None:
                end_group(build, grace=10)

    def start_build(self) -> subprocess.Popen[bytes] | None:
        """Start the installer; None where the right Horovod is there already."""
        if self.device == "cpu" and importlib.util.find_spec("horovod"):
            return None
        self.end += SECONDS["cuda"] - SECONDS[self.device]
        from torch.version import cuda

        command = [sys.executable, "-m", "horovod_lm.setup.install_horovod"]
        command += ["--nccl" if cuda else "--no-nccl", "--target", str(self.horovod)]
        if self.source:
            cache = self.horovod.with_name("cache")
            (cache / "sdist").mkdir(parents=True, exist_ok=True)
            shutil.copy(self.source, cache / "sdist" / "horovod-0.28.1.tar.gz")
            command = ["env", f"HOROVOD_LM_CACHE={cache}", *command]
        return self.start(command, "build")

    def run_part(self, part: str, limit: float) -> None:
        """Run a part in a process of its own, and end what it started when its time is over."""
        started, result = time.monotonic(), self.work / f"{part}.json"
        command = [sys.executable, str(ROOT / "tests/gpu/parts.py"), part]
        command += ["--device", self.device, "--work", str(self.work), "--result", str(result)]
        code = self.wait(self.start(command, part), limit)
        if not result.exists():
            self.record(part, self.result(part, code), started)
            return
        found = json.loads(result.read_text())
        failed = ", ".join(found["failed"])
        self.record(part, f"FAILED: {failed}" if failed else "holds", started, found["facts"])

    def record(
        self, part: str, result: str, started: float | None = None, facts: dict | None = None
    ) -> None:
        """Add a row, and print it."""
        seconds = round(time.monotonic() - started, 1) if started else 0.0
        row = {"part": part, "result": result, "seconds": seconds, "facts": facts or {}}
        self.rows.append(row)
        print(f"{part}: {result} ({seconds:.0f} s)", flush=True)

    def start(self, command: list[str], name: str) -> subprocess.Popen[bytes]:
        """Start a command in a process group of its own, with its output in a log."""
        places = [str(self.horovod), str(ROOT), os.environ.get("PYTHONPATH", "")]
        env = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, places)),
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # needed by deterministic algorithms
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
            return process.wait(max(0.1, seconds))
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                end_group(process, grace=10)

    def result(self, name: str, code: int | None) -> str:
        """Return the result of a process without a result file, by its exit code and its log."""
        if code == 0:
            return "holds"
        if code is None:
            return "FAILED: not done in time"
        lines = (self.work / f"{name}.log").read_text(errors="replace").strip().splitlines()
        return f"FAILED: {lines[-1][:300] if lines else f'exit code {code}'}"

    def seconds_left(self) -> float:
        return self.end - time.monotonic()

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


def shown(value: Any) -> str:
    """Return a fact as the table shows it."""
    if isinstance(value, dict):
        return f"{value['value']:.1e} (at most {value['at_most']:.0e})"
    return ("no", "yes")[value] if isinstance(value, bool) else str(value)


def describe_machine(device: str) -> dict[str, str]:
    """Return the hardware and software that the figures belong to."""
    import torch

    machine = {"card": "CPU", "torch": torch.__version__, "Python": platform.python_version()}
    if device == "cuda":
        query = "nvidia-smi --query-gpu=driver_version --format=csv,noheader | head -n 1"
        driver = subprocess.run(query, shell=True, capture_output=True, text=True).stdout.strip()
        machine |= {
            "card": torch.cuda.get_device_name(0),
            "cards": str(torch.cuda.device_count()),
            "CUDA": str(torch.version.cuda),
            "NCCL": ".".join(map(str, torch.cuda.nccl.version())),
            "driver": driver or "unknown",
        }
    return machine


def why_no_gpu() -> str | None:
    """Return why nothing can run on a GPU here, or None."""
    if importlib.util.find_spec("torch") is None:
        return f"{sys.executable} has no torch; name a Python that has: make gpu PYTHON=..."
    import torch

    if torch.cuda.is_available():
        return None
    lacks = "finds no NVIDIA GPU here" if torch.version.cuda else "is built without CUDA"
    return f"torch {torch.__version__} of {sys.executable} {lacks}"


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
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    problem = why_no_gpu() if arguments.device == "cuda" else None
    if problem:
        print(f"error: {problem}; --device cpu rehearses without a GPU", file=sys.stderr)
        return 1
    # A shell starts its background jobs with SIGINT ignored, and the parts would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    source = arguments.source.absolute() if arguments.source else None
    kit = Kit(arguments.device, arguments.out.absolute(), source)
    kit.run({part: PARTS[part] for part in arguments.parts or PARTS})
    kit.write()
    return 0 if all(row["result"] == "holds" for row in kit.rows) else 1


if __name__ == "__main__":
    sys.exit(main())
