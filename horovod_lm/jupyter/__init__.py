"""What only notebooks need: ranks started from a cell, widgets, figures, and exercises.

`%load_ext horovod_lm.jupyter` gives a notebook the magics `%%horovodrun` and `%%px`, and makes
`!command` use this environment's `python` and `horovodrun` and raise an error when it fails.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell


def load_ipython_extension(shell: InteractiveShell) -> None:
    """Register the magics, and make failing shell commands raise errors."""
    from horovod_lm.jupyter.run_cell.magics import HorovodMagics
    from horovod_lm.jupyter.shell import put_programs_on_path, stop_where_a_command_fails

    shell.register_magics(HorovodMagics)
    put_programs_on_path()
    if getattr(shell, "kernel", None) is not None:  # in a terminal the user sees it
        stop_where_a_command_fails(shell)
