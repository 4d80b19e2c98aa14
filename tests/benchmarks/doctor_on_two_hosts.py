"""What the doctor says of two hosts, one of which is broken, and what it says after the cure.

    python tests/benchmarks/doctor_on_two_hosts.py --json tests/benchmarks/doctor_on_two_hosts.json

notebooks/09_beyond_one_machine.ipynb does the same, and reads this report where a machine allows no
network namespaces. Needs Linux and root; ten seconds.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from horovod_lm.teaching.simulated_hosts import INTERFACE, Hosts
from horovod_lm.utils.config import load_config, save_config

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "tiny.yaml"
OTHER_NAME = "eth7"
RENAME = "ip link set {0} down; ip link set {0} name {1}; ip link set {1} up"


def examine() -> dict[str, list[dict[str, str]]]:
    """Return the doctor's findings while an interface has another name, and when it has not."""
    report = {}
    with tempfile.TemporaryDirectory() as project, Hosts(2) as hosts:
        path = save_config(
            hosts.configure(load_config(CONFIG)), Path(project, "configs", "cluster.yaml")
        )
        command = [sys.executable, "-m", "horovod_lm.setup.doctor", "--hosts", str(path), "--json"]
        for state, names in (
            ("broken", (INTERFACE, OTHER_NAME)),
            ("cured", (OTHER_NAME, INTERFACE)),
        ):
            hosts.run(["sh", "-c", RENAME.format(*names)], "host1")
            report[state] = json.loads(hosts.run(command).stdout)["findings"]
    return report


def main() -> None:
    """Examine, print, and keep the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="where to keep the report")
    arguments = parser.parse_args()
    text = json.dumps(examine(), indent=1) + "\n"
    print(text, end="")
    if arguments.json:
        arguments.json.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
