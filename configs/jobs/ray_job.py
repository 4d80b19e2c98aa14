"""The model of cluster.yaml on a Ray cluster, with Horovod's own launcher for Ray.

    ray job submit --working-dir . -- python configs/jobs/ray_job.py

What of it was run: Python compiled it, no more. Ray was not at hand, and Horovod 0.28.1 is of the
time of Ray 2.2: what fails first with a newer Ray is likely `horovod.ray` itself.
"""

from __future__ import annotations

import ray
from horovod.ray import RayExecutor

CONFIG = "configs/cluster.yaml"
HOSTS, RANKS_PER_HOST = 2, 4  # ranks: as many as a host has GPUs


def train() -> None:
    """What each rank runs: the same as `python -m horovod_lm.train`."""
    from horovod_lm.train import run_distributed_training
    from horovod_lm.utils.config import load_config
    from horovod_lm.utils.distributed import setup_horovod, shutdown

    world_size, rank, local_rank, _ = setup_horovod()
    run_distributed_training(load_config(CONFIG), rank, world_size, local_rank, run_name="ray")
    shutdown()


if __name__ == "__main__":
    ray.init(address="auto")
    executor = RayExecutor(
        RayExecutor.create_settings(timeout_s=120),
        num_hosts=HOSTS,
        num_workers_per_host=RANKS_PER_HOST,
        use_gpu=True,
    )
    executor.start()
    executor.run(train)
    executor.shutdown()
