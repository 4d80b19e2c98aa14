"""Run by horovodrun on two ranks: every helper of utils.distributed, results as JSON per rank."""

import itertools
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
# Content of any size: tensors go one by one, each in messages of a limited size.
d.MAX_BROADCAST_BYTES = 16
hvd, sizes = d._horovod(), []
send = hvd.broadcast_async_
hvd.broadcast_async_ = lambda part, *rest: (sizes.append(len(part)), send(part, *rest))[1]
generator = torch.Generator().manual_seed(rank)
content = {
    "model": {"a": torch.randn(7, 3, generator=generator), "b": torch.randn(5).bfloat16()},
    "optimizer": [(torch.tensor(rank), torch.tensor([True, False])), {"none": torch.zeros(0, 3)}],
    "transposed": torch.arange(6.0).view(2, 3).t(),
    "name": "é",
}
received = d.broadcast_object(content if rank else None, "i", root_rank=1)
hvd.broadcast_async_ = send
seen["sizes"] = sizes
sums = d.map_tensors(received, lambda tensor: [str(tensor.dtype), tensor.tolist()])
seen["content"] = json.dumps(sums)


class Elsewhere(torch.Tensor):
    """A tensor whose copy in CPU memory is a copy, as a GPU's is."""

    def cpu(self) -> torch.Tensor:
        return self.clone().as_subclass(torch.Tensor)


model = torch.nn.Linear(2, 2)
torch.nn.init.constant_(model.weight, 5.0 + rank)
model.register_buffer("elsewhere", torch.full((1, 2), 5.0 + rank).as_subclass(Elsewhere))
d.broadcast_parameters(model)
seen["parameters"] = [*model.weight.tolist(), *model.elsewhere.tolist()]


def work() -> None:
    time.sleep(1.0)  # longer than several questions of the rank that waits
    with open(folder / "worked", "a") as file:
        file.write(f"{rank}\n")


d.local_rank_zero_first(work)
seen["worked"] = (folder / "worked").read_text()


def fail() -> None:
    raise DataError(f"a sentence from rank {rank}")


try:
    d.local_rank_zero_first(fail)
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


def train(staged: bool, passes: int, groups: int, clip: float | None, compression: str) -> tuple:
    """Return the parameters after five steps, and whether a gradient kept its memory."""
    torch.manual_seed(3)  # the same model everywhere; each rank has its own inputs
    net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 4))
    inputs = torch.randn(5, 2, passes, 6, 8)[:, rank]
    optimizer = d.distributed_optimizer(
        torch.optim.AdamW(net.parameters(), lr=1e-2), net.named_parameters(), passes,
        DistributedConfig(reduction_groups=groups, compression=compression), staged,
    )  # fmt: skip
    for step in inputs:
        for batch in step:
            net(batch).square().mean().backward()
        before = net[0].weight.grad.data_ptr()
        d.synchronize(optimizer)
        in_place = net[0].weight.grad.data_ptr() == before
        if clip:
            torch.nn.utils.clip_grad_norm_(net.parameters(), clip)
        with d.already_synchronized(optimizer):
            optimizer.step()
        optimizer.zero_grad()
    return torch.cat([parameter.detach().flatten() for parameter in net.parameters()]), in_place


seen["staging"] = {}
for case in itertools.product((1, 2), (0, 2), (None, 0.05), ("none", "fp16")):
    (plain, plain_in_place), (staged, staged_in_place) = train(False, *case), train(True, *case)
    seen["staging"][str(case)] = [torch.equal(plain, staged), plain_in_place, staged_in_place]

(folder / f"rank{rank}.json").write_text(json.dumps(seen))
d.shutdown()
d.shutdown()
assert not d.is_distributed() and d.get_world_size() == 1
