"""The parts of `make gpu`: each runs in a process of its own and writes its measurements.

    python tests/gpu/parts.py logits --device cuda --work FOLDER --result logits.json

A part calls `found.fact` for measurements, and `found.at_most` and `found.holds` for what must
hold; the file gets all of them, and the names of those that did not hold. `--device cpu` uses small
models.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
GPT2_SMALL = {"vocab_size": 50257, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 512}
SMALL = {"vocab_size": 50257, "n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 64}
STEPS = 20


@dataclass
class Found:
    """The measurements of a part, in the order in which they are shown."""

    device: torch.device
    work: Path
    facts: dict[str, Any] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def shape(self) -> dict[str, int]:
        return GPT2_SMALL if self.on_gpu else SMALL

    def fact(self, name: str, value: Any) -> None:
        self.facts[name] = value

    def at_most(self, name: str, value: float, limit: float) -> None:
        """Record a difference; it must not exceed the limit, and NaN exceeds every limit."""
        self.facts[name] = {"value": value, "at_most": limit}
        if not value <= limit:
            self.failed.append(name)

    def holds(self, name: str, value: bool) -> None:
        self.facts[name] = value
        if not value:
            self.failed.append(name)


def build_model(shape: dict[str, int], dropout: float = 0.0, **changes: Any) -> torch.nn.Module:
    """Return a model on the CPU; its weights are larger than usual, so that logits do not tie."""
    from horovod_lm.models.transformer_lm import TransformerLM

    torch.manual_seed(0)
    width = shape["n_embd"]
    model = TransformerLM(
        vocab_size=shape["vocab_size"], d_model=width, n_heads=shape["n_head"],
        n_layers=shape["n_layer"], d_ff=4 * width, max_seq_len=shape["n_positions"],
        dropout=dropout, pad_token_id=None, **changes,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model


def random_ids(shape: dict[str, int], rows: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(shape["vocab_size"], (rows, shape["n_positions"]), generator=generator)


def difference(one: torch.Tensor, two: torch.Tensor) -> float:
    """Return the largest difference, relative to the largest value."""
    one, two = one.detach().double().cpu(), two.detach().double().cpu()
    return float((one - two).abs().max() / two.abs().max().clamp(min=1e-30))


def loss_and_gradients(
    model: torch.nn.Module, ids: torch.Tensor, amp: torch.dtype | None = None, **how: Any
) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(2)  # of dropout
    with torch.autocast(ids.device.type, amp, enabled=amp is not None):
        _, loss = model(ids, labels=ids, **how)
    loss.backward()
    return {"loss": loss.detach()} | {
        name: parameter.grad.clone() for name, parameter in model.named_parameters()
    }


def largest(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    return max(difference(value, two[name]) for name, value in one.items())


# ---- the model -----------------------------------------------------------------------------------


@torch.no_grad()
def logits(found: Found) -> None:
    """The device's logits are the CPU's, and those of `transformers` where it is installed."""
    ids = random_ids(found.shape, 2)
    model = build_model(found.shape).eval()
    expected = model.double()(ids)[0]
    for dtype, limit in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        ours = model.to(found.device, dtype)(ids.to(found.device))[0]
        found.at_most(f"{dtype}, to the CPU's", difference(ours, expected), limit)
    with torch.autocast(found.device.type, torch.bfloat16):
        ours = model(ids.to(found.device))[0]
    found.at_most("bfloat16, to the CPU's", difference(ours, expected), 0.05)
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        found.fact("transformers", "not installed: compared with our own CPU result only")
        return
    from horovod_lm.models.gpt2 import from_gpt2

    theirs = GPT2LMHeadModel(GPT2Config(**found.shape, bos_token_id=0, eos_token_id=0)).eval()
    for parameter in theirs.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.02)
    ours = from_gpt2(theirs).eval()
    ids = ids.to(found.device)
    for dtype, limit in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        theirs, ours = theirs.to(found.device, dtype), ours.to(found.device, dtype)
        off = difference(ours(ids)[0], theirs(ids).logits)
        found.at_most(f"{dtype}, to transformers'", off, limit)


def chunked_cross_entropy(found: Found) -> None:
    """The chunked loss and its gradients equal those computed from all logits."""
    ids = random_ids(found.shape, 4 if found.on_gpu else 16).to(found.device)
    model = build_model(found.shape).to(found.device)
    found.fact("positions x vocabulary", f"{ids.numel()} x {found.shape['vocab_size']}")
    for dtype, limit in ((torch.float32, 1e-4), (torch.float64, 1e-10)):
        model.to(dtype)
        chunked = loss_and_gradients(model, ids, return_logits=False)
        whole = loss_and_gradients(model, ids, return_logits=True)
        found.at_most(f"{dtype}, loss and gradients", largest(chunked, whole), limit)


def gradient_checkpointing(found: Found) -> None:
    """Activations that are computed again give the same bits, dropout included."""
    torch.use_deterministic_algorithms(True)
    ids = random_ids(found.shape, 4).to(found.device)
    for amp in (None, torch.bfloat16):
        plain, again = (
            loss_and_gradients(model.to(found.device).train(), ids, amp, return_logits=False)
            for model in (
                build_model(found.shape, dropout=0.1, gradient_checkpointing=on)
                for on in (False, True)
            )
        )
        name = amp or torch.float32
        found.at_most(f"{name}, loss and gradients", largest(plain, again), 0.0)


def cached_generation(found: Found) -> None:
    """The cache changes no token: greedy and sampled, padded, and beyond the context."""
    shape = SMALL | {"vocab_size": 500, "n_positions": 32}
    model = build_model(shape).double().to(found.device).eval()
    ids = random_ids(shape, 3)[:, :7]
    mask = torch.tensor([[1] * 7, [0] * 3 + [1] * 4, [0] * 6 + [1]])
    ids, mask = (ids * mask).to(found.device), mask.to(found.device)
    for temperature in (0.0, 1.0):
        cached, uncached = (
            model.generate(ids, 60, temperature, eos_token_id=None, attention_mask=mask, seed=3,
                           use_cache=use_cache)
            for use_cache in (True, False)
        )  # fmt: skip
        found.holds(f"float64, temperature {temperature}: equal", torch.equal(cached, uncached))
    model = build_model(found.shape).to(found.device).eval()
    prompt = random_ids(found.shape, 1)[:, :8].to(found.device)
    new_tokens = found.shape["n_positions"] - 8
    for name, use_cache in (("with the cache", True), ("without", False)):
        model.generate(prompt, 8, 0.0, eos_token_id=None, use_cache=use_cache)
        started = time.perf_counter()
        model.generate(prompt, new_tokens, 0.0, eos_token_id=None, use_cache=use_cache)
        rate = new_tokens / (time.perf_counter() - started)
        found.fact(f"tokens per second {name}", round(rate))


# ---- training ------------------------------------------------------------------------------------


def settings(found: Found, **changes: Any) -> dict[str, Any]:
    """Return the settings of a small run whose files are all in the work folder."""
    return {
        "training.device": found.device.type, "model.dropout": 0.1,
        "model.vocab_size": 257, "data.tokenizer": "byte",
        "data.num_stories": 1000, "data.data_dir": str(found.work / "data"),
        "training.max_steps": STEPS, "training.checkpoint_interval": STEPS // 2,
        "training.eval_interval": STEPS, "training.eval_batches": 2,
        "paths.run_dir": str(found.work / "runs/${run_name}"),
        "paths.checkpoint_dir": str(found.work / "runs/${run_name}/checkpoints"),
        "paths.log_dir": str(found.work / "runs/${run_name}/logs"),
        "paths.tensorboard_dir": str(found.work / "runs/${run_name}/tensorboard"),
        **changes,
    }  # fmt: skip


def final_model(found: Found, run: str) -> dict[str, Any]:
    path = found.work / "runs" / run / "checkpoints/final_model.pt"
    return torch.load(path, map_location="cpu", weights_only=True)


def resume(found: Found) -> None:
    """A run that is resumed half-way equals an uninterrupted one, bit for bit."""
    from horovod_lm.train import run_distributed_training
    from horovod_lm.utils.config import load_config

    torch.use_deterministic_algorithms(True)
    for amp in ("float32", "bfloat16"):
        config = load_config(
            ROOT / "configs/tiny.yaml", settings(found, **{"training.amp_dtype": amp})
        )
        whole, again = f"whole-{amp}", f"resumed-{amp}"
        run_distributed_training(config, 0, 1, 0, None, whole)
        folder = found.work / "runs" / whole / "checkpoints"
        [checkpoint] = folder.glob(f"*_step{STEPS // 2}.pt")
        run_distributed_training(config, 0, 1, 0, checkpoint, again)
        one, two = final_model(found, whole), final_model(found, again)
        found.at_most(f"{amp}, parameters", largest(one["model"], two["model"]), 0.0)
        moments = [
            {f"{number} {name}": value for number, state in end["optimizer"]["state"].items()
             for name, value in state.items()}
            for end in (one, two)
        ]  # fmt: skip
        found.at_most(f"{amp}, the optimizer's state", largest(*moments), 0.0)


def two_ranks(found: Found) -> None:
    """One rank with batch 2B and two ranks with batch B each, on one GPU, are the same training."""
    config = ROOT / "configs/tiny.yaml"
    cases = {"adamw-float64": ("adamw", "float64", 1e-10), "sgd-float32": ("sgd", "float32", 1e-5)}
    for ranks in (1, 2):
        runs = {
            f"{name}-on-{ranks}": settings(found, **{
                "training.optimizer": optimizer, "training.dtype": dtype, "model.dropout": 0.0,
                "training.per_gpu_batch_size": 8 // ranks, "training.amp_dtype": "float32",
            })
            for name, (optimizer, dtype, _) in cases.items()
        }  # fmt: skip
        file = found.work / f"cases-on-{ranks}.json"
        file.write_text(json.dumps(runs))
        script = ROOT / "tests/ranks_train_cases.py"
        env = dict(os.environ)
        if found.on_gpu:
            env["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        said = horovodrun(ranks, [str(script), str(config), str(file)], env)
        found.fact(f"{ranks} rank(s)", first_line_of_run(said))
    for name, (_, _, limit) in cases.items():
        one, two = (final_model(found, f"{name}-on-{ranks}") for ranks in (1, 2))
        found.at_most(f"{name}, parameters", largest(one["model"], two["model"]), limit)


def first_line_of_run(said: str) -> str:
    """Return the line in which a run names its device."""
    lines = [line for line in said.splitlines() if " parameters, " in line]
    return lines[0].partition(": ")[2] if lines else "no line about it"


def horovodrun(ranks: int, arguments: list[str], env: dict[str, str]) -> str:
    """Run Python on ranks of this machine; return their output."""
    launcher = [sys.executable, "-m", "horovod.runner.launch", "--gloo", "-np", str(ranks)]
    done = subprocess.run(
        [*launcher, sys.executable, *arguments], env=env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    print(done.stdout, flush=True)
    if done.returncode != 0:
        raise RuntimeError(f"{ranks} rank(s) ended with exit code {done.returncode}")
    return done.stdout


# ---- Horovod -------------------------------------------------------------------------------------


def collectives(found: Found) -> None:
    """Every collective on every type, through NCCL on one rank, and on two with two GPUs."""
    gpus = torch.cuda.device_count() if found.on_gpu else 2
    for ranks in (1, 2) if gpus >= 2 else (1,):
        result, log = (found.work / f"collectives-{ranks}.{end}" for end in ("json", "log"))
        env = {**os.environ, "NCCL_DEBUG": "INFO", "NCCL_DEBUG_FILE": str(log)}
        arguments = [__file__, "collectives_of_rank", "--device", found.device.type]
        horovodrun(ranks, [*arguments, "--work", str(found.work), "--result", str(result)], env)
        said = json.loads(result.read_text())
        found.facts |= {f"{ranks} rank(s): {name}": value for name, value in said["facts"].items()}
        found.failed += said["failed"]
        if found.on_gpu:
            text = log.read_text() if log.exists() else ""
            found.holds(f"{ranks} rank(s): reduced by NCCL", "Init COMPLETE" in text)


def collectives_of_rank(found: Found) -> None:
    """One rank's share of `collectives`."""
    import horovod.torch as hvd

    hvd.init()
    rank, size = hvd.rank(), hvd.size()
    if found.on_gpu:
        torch.cuda.set_device(hvd.local_rank())
    where = {"device": found.device}
    built = {name: bool(getattr(hvd, f"{name}_built")()) for name in ("gloo", "cuda", "nccl")}
    found.fact("built with", " ".join(name for name, has in built.items() if has))
    right = True
    for dtype in (torch.float32, torch.float16, torch.float64, torch.int32, torch.int64):
        base = torch.arange(1000, **where).remainder(7).to(dtype)
        total = sum(range(1, size + 1))
        name = str(dtype)
        summed = hvd.allreduce(base * (rank + 1), op=hvd.Sum, name=f"sum {name}")
        sent = hvd.broadcast(base * (rank + 1), size - 1, name=f"broadcast {name}")
        gathered = hvd.allgather(base[: rank + 1], name=f"gather {name}")
        right &= torch.equal(summed, base * total) and torch.equal(sent, base * size)
        right &= len(gathered) == total
    found.holds("sum, broadcast, allgather of 5 types", right)
    grouped = hvd.grouped_allreduce(
        [torch.full((5,), rank + 1.0, **where), torch.ones(7, **where)], op=hvd.Average, name="g"
    )
    found.holds("grouped allreduce", grouped[0].tolist() == [(size + 1) / 2] * 5)
    for megabytes in (0.004, 4, 256) if found.on_gpu else (0.004, 4):
        tensor, times = torch.ones(int(megabytes * 250_000), **where), []
        for _ in range(12):
            started = time.perf_counter()
            hvd.allreduce_(tensor, op=hvd.Average, name="timed")
            float(tensor[0])  # waits for the GPU
            times.append(time.perf_counter() - started)
        found.fact(f"allreduce of {megabytes} MB, ms", round(1e3 * sorted(times)[6], 3))
    hvd.shutdown()
    hvd.init()  # live ranks and elastic training start Horovod again in the same process
    again = hvd.allreduce(torch.ones(2, **where), op=hvd.Sum, name="again")
    found.holds("a second init", again.tolist() == [float(size)] * 2)
    hvd.shutdown()


# ---- speed ---------------------------------------------------------------------------------------


def asynchronous(found: Found) -> None:
    """A training step waits for nothing on the GPU, its own loss and gradient norm included."""
    from horovod_lm.data import prepare_data
    from horovod_lm.training.run_dir import RunFolder
    from horovod_lm.training.trainer import Trainer
    from horovod_lm.utils.config import load_config
    from horovod_lm.utils.distributed import agree_on_devices
    from horovod_lm.utils.interrupts import StopRequest
    from horovod_lm.utils.progress import ProgressLine

    amp = {"training.amp_dtype": "bfloat16"}
    config = load_config(ROOT / "configs/tiny.yaml", settings(found, **amp))
    prepare_data(config)
    trainer = Trainer(
        config, RunFolder.of(config, "asynchronous"), 0, 1, agree_on_devices(found.device.type, 0),
        ProgressLine(enabled=False), StopRequest(),
    )  # fmt: skip
    batches = iter(trainer.train_loader)
    for step in range(8):
        if found.on_gpu and step == 3:
            torch.cuda.set_sync_debug_mode("error")
        trainer.train_step(batches)
    if found.on_gpu:
        torch.cuda.set_sync_debug_mode("default")
    found.holds("no step waits", True)


def speed(found: Found, length: int = 512) -> None:
    """A training step of GPT-2 small in bfloat16: tokens per second, MFU, peak memory.

    NANOGPT is the path of nanoGPT's model.py, which is measured beside ours.
    """
    from horovod_lm.utils.machine import bfloat16_peak
    from tests.benchmarks import step as benchmark

    # As many tokens as in configs/config.yaml.
    small = (5000, 64, 4, 2, 2, 64)
    shape = (50257, 768, 12, 12, 8192 // length, length) if found.on_gpu else small
    nanogpt = os.environ.get("NANOGPT", "")
    cases = [("ours", True), ("nanoGPT", True)] if nanogpt else [("ours", True)]
    cases += [("ours", False), ("plain", False)]
    if importlib.util.find_spec("transformers"):
        cases.append(("transformers", False))
    torch.set_default_device(found.device)
    flops = build_model({**GPT2_SMALL, "n_positions": length}).flops_per_token()
    peak = bfloat16_peak(found.device)
    for peer, compiled in cases:
        name = f"{peer}, compiled" if compiled else peer
        if found.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        take_step = benchmark.make_step(peer, shape, nanogpt, torch.bfloat16, compiled)
        started = time.perf_counter()
        take_step().item()
        found.fact(f"{name}, first step in s", round(time.perf_counter() - started, 1))
        rates, steps = [], 10 if found.on_gpu else 2
        for _ in range(5):
            started = time.perf_counter()
            for _ in range(steps):
                loss = take_step()
            loss.item()  # waits for the GPU
            rates.append(steps * shape[-2] * shape[-1] / (time.perf_counter() - started))
        rate = statistics.median(rates[1:])
        found.fact(f"{name}, tokens per second", round(rate))
        if peak:
            found.fact(f"{name}, MFU in %", round(100 * flops * rate / peak, 1))
            found.fact(f"{name}, peak GB", round(torch.cuda.max_memory_allocated() / 1e9, 2))


def speed_1024(found: Found) -> None:
    """`speed` with GPT-2's own context."""
    speed(found, length=1024)


PARTS: dict[str, Callable[[Found], None]] = {
    part.__name__: part
    for part in (logits, chunked_cross_entropy, gradient_checkpointing, cached_generation, resume,
                 asynchronous, collectives, collectives_of_rank, two_ranks, speed, speed_1024)
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--work", type=Path, required=True, help="folder for data and runs")
    parser.add_argument("--result", type=Path, required=True, help="JSON file of what was found")
    arguments = parser.parse_args()
    found = Found(torch.device(arguments.device), arguments.work)
    PARTS[arguments.part](found)
    if os.environ.get("HOROVOD_RANK", "0") == "0":
        arguments.result.write_text(json.dumps({"facts": found.facts, "failed": found.failed}))


if __name__ == "__main__":
    main()
