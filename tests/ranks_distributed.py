"""Run by horovodrun on two ranks: every helper of utils.distributed, results as JSON per rank."""

import json
import os
import sys
import time
from pathlib import Path

import torch

from horovod_lm.utils import distributed as d
from horovod_lm.utils.config import DistributedConfig
from horovod_lm.utils.errors import DataError

folder = Path(sys.argv[1])
seen = {"before": [d.is_distributed(), d.get_rank(), d.get_world_size(), d.is_main_process()]}
seen["launched"] = d.started_by_launcher()
settings = DistributedConfig(
    fusion_threshold_mb=3.0, cycle_time_ms=7.0, stall_warning_seconds=11, stall_shutdown_seconds=22,
    gloo_timeout_seconds=33, interface="no-such-interface", reduction_groups=2, compression="fp16",
)  # fmt: skip
seen["setup"] = d.setup_horovod(require_distributed=True, settings=settings)
seen["again"] = d.setup_horovod(require_distributed=True, settings=settings)
rank = d.get_rank()
seen["rank"] = [rank, d.get_world_size(), d.get_local_rank(), d.get_local_size()]
seen["main"] = d.is_main_process()
seen["threads"] = torch.get_num_threads()
seen["cores"] = d.available_cores()
seen["environment"] = {name: os.environ.get(name) for name in os.environ if "HOROVOD_" in name}

seen["average"] = [
    d.metric_average(rank + 1.0, "a"),
    d.metric_average(local := torch.tensor(rank * 3.0), name="b"),
    d.metric_average(2.0**40 + rank * 2.0**-9, "c") - 2.0**40,  # float32 would lose it
]
seen["untouched"] = local.item()
summed = d.reduce_sum(torch.tensor([[1, 2], [rank, 10**9]], dtype=torch.int32), "d")
seen["sum"] = [summed.tolist(), str(summed.dtype), str(summed.device)]
handle = d.start_reduce_sum(torch.tensor([0.1, float(rank)], requires_grad=True), "e")
seen["later"] = d.finish_reduce_sum(handle).tolist()
seen["gathered"] = d.gather_objects({"rank": rank, "text": "é" * (rank + 1)}, "f")
seen["broadcast"] = [
    d.broadcast_object({"from": rank}, "g"),
    d.broadcast_object(["one"] if rank else None, "h", root_rank=1),
]
model = torch.nn.Linear(2, 2)
torch.nn.init.constant_(model.weight, 5.0 + rank)
d.broadcast_parameters(model)
seen["parameters"] = model.weight.tolist()
d.barrier()


def work() -> None:
    time.sleep(1.0)  # longer than several questions of the rank that waits
    with open(folder / "worked", "a") as file:
        file.write(f"{rank}\n")


d.once_per_host(work)
seen["worked"] = (folder / "worked").read_text()


def fail() -> None:
    raise DataError(f"a sentence from rank {rank}")


try:
    d.once_per_host(fail)
except DataError as error:
    seen["failed"] = str(error)

optimizer = d.distributed_optimizer(
    torch.optim.SGD(model.parameters(), lr=1.0), model.named_parameters(), 2, settings
)
for _ in range(2):  # two backward passes are summed, two ranks averaged: (1 + 1 + 3 + 3) / 2
    (model.weight.sum() * (1 + 2 * rank) + model.bias.sum()).backward()
d.synchronize(optimizer)
seen["gradient"] = model.weight.grad.tolist()
with d.already_synchronized(optimizer):
    optimizer.step()
seen["stepped"] = model.weight.tolist()

(folder / f"rank{rank}.json").write_text(json.dumps(seen))
d.shutdown()
d.shutdown()
assert not d.is_distributed() and d.get_world_size() == 1
