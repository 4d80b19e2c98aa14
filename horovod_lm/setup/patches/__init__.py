"""The patches that Horovod's last release needs to build and work today, and how they are applied.

Horovod 0.28.1 (June 2023) is the newest release. Its version and hash are pinned here because the
patches fit that source only. Each NN-name.patch fixes one fault; its header says what goes wrong
without it and where upstream discusses it. `tests/horovod` tests the patches that change behaviour.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import NamedTuple

from horovod_lm.utils.errors import UserError

HOROVOD_VERSION = "0.28.1"
SDIST_SHA256 = "92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0"


class Patch(NamedTuple):
    """One patch file."""

    name: str  # what the patch does, in the imperative
    why: str  # what goes wrong without it
    upstream: str  # where the upstream project discusses it, or "none found"
    diff: str  # unified, with a/ and b/ paths

    @classmethod
    def read(cls, path: Path) -> Patch:
        """Read a file: Subject, Upstream, an empty line, the reason, an empty line, the diff."""
        header, diff = path.read_text(encoding="utf-8").split("\n\n--- ", 1)
        subject, upstream, _, why = header.split("\n", 3)
        name, upstream = subject.removeprefix("Subject: "), upstream.removeprefix("Upstream: ")
        return cls(name, why.replace("\n", " "), upstream, f"--- {diff}")

    def hunks(self) -> list[tuple[str, str, str]]:
        """Return each hunk as its file, its old lines and its new lines, context included."""
        found = []
        for part in re.split(r"^--- a/", self.diff, flags=re.MULTILINE)[1:]:
            head, *bodies = re.split(r"^@@ .*\n", part, flags=re.MULTILINE)
            for body in bodies:
                lines = body.splitlines(keepends=True)
                old = "".join(line[1:] for line in lines if line[0] in " -")
                new = "".join(line[1:] for line in lines if line[0] in " +")
                found.append((head.split("\n")[0], old, new))
        return found


PATCHES = tuple(Patch.read(path) for path in sorted(Path(__file__).parent.glob("*.patch")))


def apply_patches(source: Path, patches: tuple[Patch, ...] = PATCHES) -> None:
    """Patch Horovod's unpacked source in place, or change nothing if a patch does not fit.

    A patch fits if its files contain the lines of each hunk exactly once.
    """
    texts: dict[str, str] = {}
    for patch in patches:
        for file, old, new in patch.hunks():
            if file not in texts:
                path = source / file
                texts[file] = path.read_text(encoding="utf-8") if path.is_file() else ""
            parts = re.split(f"^{re.escape(old)}", texts[file], flags=re.MULTILINE)
            if len(parts) != 2:
                raise UserError(
                    f"the patch '{patch.name}' does not fit {file}: its lines were found"
                    f" {len(parts) - 1} times instead of once; the source is not Horovod"
                    f" {HOROVOD_VERSION} as released, and nothing was changed"
                )
            texts[file] = new.join(parts)
    for file, text in texts.items():
        (source / file).write_text(text, encoding="utf-8")


def patches_digest(patches: tuple[Patch, ...] = PATCHES) -> str:
    """Return a short hash of the diffs, for the key of the build."""
    return hashlib.sha256("".join(patch.diff for patch in patches).encode()).hexdigest()[:12]
