"""Run by horovodrun on two ranks: every helper of utils.distributed."""

import itertools
import os
import sys
import time
from pathlib import Path

import torch

from horovod_lm.utils import distributed as d
from horovod_lm.utils.config import DistributedConfig
from horovod_lm.utils.errors import DataError

folder = Path(sys.argv[1])

# ---- setup: before init, a launched rank can call every function ---------------------------------

assert d.started_by_launcher() and d.is_main_process() and not d.is_distributed()
assert (d.get_rank(), d.get_world_size()) == (0, 1)
settings = DistributedConfig(
    fusion_threshold_mb=3.0, cycle_time_ms=7.0, stall_warning_seconds=11, stall_shutdown_seconds=22,
    gloo_timeout_seconds=33, interface="no-such-interface", reduction_groups=2, compression="fp16",
)  # fmt: skip
setup = d.setup_horovod(require_distributed=True, settings=settings)
rank = d.get_rank()
assert rank == int(os.environ["HOROVOD_RANK"])
assert setup == (2, rank, rank, torch.cuda.is_available())
assert setup == d.setup_horovod(require_distributed=True, settings=settings)
assert (d.get_world_size(), d.get_local_rank(), d.get_local_size()) == (2, rank, 2)
assert d.is_main_process() == (rank == 0)
assert torch.get_num_threads() == 1  # OMP_NUM_THREADS=1, which the test sets
assert os.environ["HOROVOD_FUSION_THRESHOLD"] == str(3 * 1024 * 1024)
assert os.environ["HOROVOD_STALL_CHECK_TIME_SECONDS"] == "11"
assert os.environ["HOROVOD_STALL_SHUTDOWN_TIME_SECONDS"] == "22"
assert os.environ["HOROVOD_GLOO_TIMEOUT_SECONDS"] == "33"
assert os.environ["HOROVOD_CYCLE_TIME"] == "4.5"  # the user's, not 7
assert os.environ["HOROVOD_GLOO_IFACE"] != "no-such-interface"  # horovodrun's choice

# ---- averages, sums and objects ------------------------------------------------------------------

local = torch.tensor(rank * 3.0)
assert d.metric_average(rank + 1.0, "a") == d.metric_average(local, name="b") == 1.5
assert local.item() == rank * 3.0
# float32 would lose the difference.
assert d.metric_average(2.0**40 + rank * 2.0**-9, "c") == 2.0**40 + 2.0**-10
summed = d.reduce_sum(torch.tensor([[1, 2], [rank, 10**9]], dtype=torch.int32), "d")
assert summed.tolist() == [[2, 4], [1, 2 * 10**9]]
assert (summed.dtype, summed.device.type) == (torch.float64, "cpu")
handle = d.start_reduce_sum(torch.tensor([0.5, float(rank)], requires_grad=True), "e")
assert d.finish_reduce_sum(handle).tolist() == [1.0, 1.0]
gathered = d.gather_objects({"rank": rank, "text": "é" * (rank + 1)}, "f")
assert gathered == [{"rank": 0, "text": "é"}, {"rank": 1, "text": "éé"}]
assert d.broadcast_object({"from": rank}, "g") == {"from": 0}
assert d.broadcast_object(["one"] if rank else None, "h", root_rank=1) == ["one"]

# Content of any size: tensors go one by one, each in messages of a limited size.
d.MAX_BROADCAST_BYTES = 16
hvd, sizes = d._horovod(), []
send = hvd.broadcast_async_
hvd.broadcast_async_ = lambda part, *rest: (sizes.append(len(part)), send(part, *rest))[1]
content = {
    "model": {"a": torch.randn(7, 3, generator=torch.Generator().manual_seed(1))},
    "bfloat16": torch.arange(5.0).bfloat16(),
    "optimizer": [(torch.tensor(1), torch.tensor([True, False])), {"none": torch.zeros(0, 3)}],
    "transposed": torch.arange(6.0).view(2, 3).t(),
    "name": "é",
}
received = d.broadcast_object(content if rank else None, "i", root_rank=1)
hvd.broadcast_async_ = send
assert max(sizes) == 16
values = [
    d.map_tensors(one, lambda tensor: (tensor.dtype, tensor.shape, tensor.tolist()))
    for one in (received, content)
]
assert values[0] == values[1]


class Elsewhere(torch.Tensor):
    """A tensor whose copy in CPU memory is a copy, as a GPU's is."""

    def cpu(self) -> torch.Tensor:
        return self.clone().as_subclass(torch.Tensor)


model = torch.nn.Linear(2, 2)
torch.nn.init.constant_(model.weight, 5.0 + rank)
model.register_buffer("elsewhere", torch.full((1, 2), 5.0 + rank).as_subclass(Elsewhere))
d.broadcast_parameters(model)
assert [*model.weight.tolist(), *model.elsewhere.tolist()] == [[5.0, 5.0]] * 3

# ---- work that is done once per host -------------------------------------------------------------


def work() -> None:
    time.sleep(1.0)  # longer than several questions of the rank that waits
    with open(folder / "worked", "a") as file:
        file.write(f"{rank}\n")


def fail() -> None:
    raise DataError(f"a sentence from rank {rank}")


d.local_rank_zero_first(work)
assert (folder / "worked").exists()
try:
    d.local_rank_zero_first(fail)
    raise AssertionError("the error of rank 0 did not reach this rank")
except DataError as error:
    assert str(error) == "a sentence from rank 0"

# ---- gradients -----------------------------------------------------------------------------------

optimizer = d.distributed_optimizer(
    torch.optim.SGD(model.parameters(), lr=1.0), model.named_parameters(), 2, settings
)
for _ in range(2):  # two backward passes are summed, two ranks averaged: (1 + 1 + 3 + 3) / 2
    (model.weight.sum() * (1 + 2 * rank) + model.bias.sum()).backward()
d.synchronize(optimizer)
assert model.weight.grad.tolist() == [[4.0, 4.0], [4.0, 4.0]]
with d.already_synchronized(optimizer):
    optimizer.step()
assert model.weight.tolist() == [[1.0, 1.0], [1.0, 1.0]]


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


# Staged gradients give the bits of plain Horovod.
for case in itertools.product((1, 2), (0, 2), (None, 0.05), ("none", "fp16")):
    (plain, plain_in_place), (staged, staged_in_place) = train(False, *case), train(True, *case)
    assert torch.equal(plain, staged), case
    # Horovod reduces the gradient where it is; staged, it reduces a copy.
    assert plain_in_place == ("fp16" not in case) and not staged_in_place, case

d.shutdown()
d.shutdown()
assert not d.is_distributed() and d.get_world_size() == 1
print("all well")
