"""From a fresh machine to an environment with a working Horovod.

`bootstrap` and `environment` are `make setup`; `install_horovod` builds and installs Horovod, with
`toolchain`, `cuda`, `patches`, `build` and `trial`; `doctor` and `doctor_hosts` check machines.
"""
