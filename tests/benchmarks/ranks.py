"""One of two ranks that train, or one of two processes that never talk; `bench.py` starts both.

    horovodrun -np 2 python tests/benchmarks/ranks.py horovod ours 30M float32 4 ""

Prints the seconds of each step after two steps of warm-up, as JSON, on rank 0.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.benchmarks import step as benchmark

WARM_UP = 2


def main() -> None:
    how, model_name, shape_name, dtype, n_steps, nanogpt = sys.argv[1:]
    from horovod_lm.utils import distributed
    from horovod_lm.utils.config import load_config

    torch.set_num_threads(1)
    model, loss_of, optimizer = benchmark.build(model_name, benchmark.SHAPES[shape_name], nanogpt)
    run, rank = model, int(os.environ.get("RANK", "0"))
    if how == "horovod":
        settings = load_config(benchmark.ROOT / "configs" / "laptop.yaml").distributed
        _, rank, _, _ = distributed.setup_horovod(settings=settings)
        optimizer = distributed.distributed_optimizer(
            optimizer, model.named_parameters(), settings=settings
        )
        distributed.broadcast_parameters(model)
    elif how == "ddp":
        torch.distributed.init_process_group("gloo")
        run = torch.nn.parallel.DistributedDataParallel(model)
    take_step = benchmark.step_function(
        run, loss_of, optimizer, benchmark.SHAPES[shape_name], getattr(torch, dtype), seed=rank
    )
    seconds = []
    for _ in range(WARM_UP + int(n_steps)):
        started = time.perf_counter()
        take_step()
        seconds.append(time.perf_counter() - started)
    if rank == 0:
        print(json.dumps(seconds[WARM_UP:]), flush=True)
    if how == "horovod":
        distributed.shutdown()
    elif how == "ddp":
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
