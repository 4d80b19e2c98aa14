"""The page about several hosts: true also where none can be made, and true to the job files."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from horovod_lm.teaching.namespaces import SEARCHED
from horovod_lm.teaching.notebooks import read_notebook
from horovod_lm.teaching.simulated_hosts import why_not_here
from tests.conftest import ROOT

PAGE = ROOT / "notebooks" / "09_beyond_one_machine.ipynb"
WITHOUT_SSHD = 'mount --bind /dev/null "$0" && exec "$@"'  # for this one process and its children
FILES = {
    "slurm-lines": "slurm.sbatch",
    "kubernetes-lines": "kubernetes.yaml",
    "ray-lines": "ray_job.py",
}


@pytest.mark.horovod
@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.skipif(bool(why_not_here()), reason="then its other test has shown it")
def test_it_gives_its_stored_outputs_where_no_hosts_can_be_made():
    sshd = shutil.which("sshd", path=SEARCHED)
    environment = {name: value for name, value in os.environ.items() if "PYTEST" not in name}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    finished = subprocess.run(
        ["unshare", "--mount", "sh", "-c", WITHOUT_SSHD, os.path.realpath(sshd),
         sys.executable, "-m", "pytest", "--nbval", "--nbval-current-env", "-q",
         "--nbval-sanitize-with", Path(__file__).with_name("sanitize.cfg"),
         "--nbval-cell-timeout", "200", "-p", "no:cacheprovider", PAGE.name],
        cwd=PAGE.parent, env={**environment, "PATH": path, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=380,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stdout[-6000:] + finished.stderr[-2000:]


@pytest.mark.parametrize("cell", FILES)
def test_each_line_that_it_explains_stands_in_the_file(cell):
    [table] = [one.source for one in read_notebook(PAGE).cells if one.id == cell]
    explained = re.findall(r"^\| `(.+?)` \|", table, re.MULTILINE)
    assert len(explained) >= 6
    text = (ROOT / "configs" / "jobs" / FILES[cell]).read_text()
    assert [words for words in explained if words not in text] == []
