"""What only notebooks need: ranks started from a cell, figures, and the notebooks themselves.

`%load_ext horovod_lm.jupyter` gives a notebook the magics `%%horovodrun` and `%%px`. In it,
`!command` runs this environment's `python` and `horovodrun`, and stops the page when the command
fails.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell


def load_ipython_extension(shell: InteractiveShell) -> None:
    """Give a notebook its magics, and make its shell commands safe."""
    from horovod_lm.jupyter.run_cell.magics import HorovodMagics
    from horovod_lm.jupyter.shell import put_programs_on_path, stop_where_a_command_fails

    shell.register_magics(HorovodMagics)
    put_programs_on_path()
    if getattr(shell, "kernel", None) is not None:  # a terminal shows what fails, and has no page
        stop_where_a_command_fails(shell)
