"""From a fresh machine to an environment with a Horovod that works.

`bootstrap`, `preflight` and `environment` are `make setup`; `toolchain`, `patches`, `build`,
`progress` and `trial` serve `horovod_lm.setup.install_horovod`, which builds Horovod.
"""
