"""From a fresh machine to an environment with a Horovod that works.

`bootstrap` makes the environment; `toolchain`, `repairs`, `build` and `progress` serve
`horovod_lm.install_horovod`, which builds Horovod in it.
"""
