"""What only notebooks need: ranks started from a cell, figures, and the notebooks themselves.

`%load_ext horovod_lm.jupyter` gives a notebook the magic `%%horovodrun`.
"""


def load_ipython_extension(shell) -> None:
    """Give a notebook its magics."""
    from horovod_lm.jupyter.magics import HorovodMagics

    shell.register_magics(HorovodMagics)
