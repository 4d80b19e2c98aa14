"""The doctor's findings on two hosts, one of them broken, and after the repair.

    python tests/benchmarks/doctor_on_two_hosts.py > tests/benchmarks/doctor_on_two_hosts.json

notebooks/09_beyond_one_machine.ipynb does the same, and reads this report where hosts cannot be
simulated. Needs Linux and root; ten seconds.
"""

from __future__ import annotations

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
    """Return the doctor's findings with a renamed interface, and with its right name."""
    report = {}
    with tempfile.TemporaryDirectory() as project, Hosts(2) as hosts:
        path = Path(project, "configs", "cluster.yaml")
        save_config(hosts.configure(load_config(CONFIG)), path)
        command = [sys.executable, "-m", "horovod_lm.setup.doctor", "--hosts", str(path), "--json"]
        renamed = {"broken": (INTERFACE, OTHER_NAME), "cured": (OTHER_NAME, INTERFACE)}
        for state, names in renamed.items():
            hosts.run(["sh", "-c", RENAME.format(*names)], "host1")
            report[state] = json.loads(hosts.run(command).stdout)["findings"]
    return report


if __name__ == "__main__":
    print(json.dumps(examine(), indent=1))
