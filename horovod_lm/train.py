"""Train a model: the public functions and the command `python -m horovod_lm.train`."""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from horovod_lm.utils.cli import EXIT_INTERRUPTED, add_config_arguments, command, run_cli, shown
from horovod_lm.utils.config import Config, load_config, resolve_path
from horovod_lm.utils.errors import CheckpointError, UserError
from horovod_lm.utils.progress import format_seconds, plural

if TYPE_CHECKING:
    from horovod_lm.training.checkpoint import load_checkpoint, save_checkpoint
    from horovod_lm.training.run_logger import TrainingResult
    from horovod_lm.training.trainer import run_distributed_training

__all__ = ["load_checkpoint", "run_distributed_training", "save_checkpoint"]

EXAMPLES = """examples:
  python -m horovod_lm.train --config configs/tiny.yaml
  horovodrun -np 2 python -m horovod_lm.train --config configs/tiny.yaml --run-name first
  horovodrun -np 2 python -m horovod_lm.train --resume runs/first
  python -m horovod_lm.train --config configs/laptop.yaml --set data.source=files \\
      --set data.path=my_book.txt --set data.data_dir=data/preprocessed/my_book

A run is a folder, runs/NAME: configuration, metrics.csv, TensorBoard events, logs, checkpoints.
Ctrl-C stops every rank after the current step, saves a checkpoint, and prints how to resume."""


def __getattr__(name: str) -> Any:
    """Import a public name, and torch with it, on first use: `--help` needs neither."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "trainer" if name == "run_distributed_training" else "checkpoint"
    return getattr(import_module(f"horovod_lm.training.{module}"), name)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    arguments = parse(argv)
    # Imported here, because torch takes a second, which --help need not wait for.
    from horovod_lm.training.trainer import run_distributed_training
    from horovod_lm.utils import distributed

    config, run_name, checkpoint = read_plan(arguments)
    world_size, rank, local_rank, _ = distributed.setup_horovod(
        arguments.elastic, config.distributed, config.training.device
    )
    if arguments.elastic:  # ranks that join later would wait for a broadcast
        # Horovod: imported here, because it needs an installed Horovod.
        from horovod_lm.training.elastic import run_elastic_training

        result = run_elastic_training(config, run_name, checkpoint)
    else:
        # Horovod: the disks of other hosts may lack the run, have another, or lack the YAML file.
        plan = distributed.broadcast_object((config, run_name, checkpoint), "plan")
        if arguments.resume or not run_name:
            config, run_name, checkpoint = plan
            distributed.set_threads(config.distributed, distributed.get_local_size())
        result = run_distributed_training(
            config, rank, world_size, local_rank, checkpoint, run_name
        )
    if distributed.is_main_process() and not result.stopped:
        print(summary(result))
    distributed.shutdown()
    # Horovod: horovodrun would report any other exit code as a failure.
    return EXIT_INTERRUPTED if result.stopped and not distributed.started_by_launcher() else 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m horovod_lm.train",
        description="Train a GPT-style language model in one process or, under horovodrun, many.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_config_arguments(parser, default="configs/tiny.yaml")
    parser.add_argument("--run-name", metavar="NAME", help="the run's folder under runs/")
    parser.add_argument(
        "--resume",
        metavar="auto|PATH",
        help="resume a run: its folder or a checkpoint; auto: the newest run, or the run of"
        " --run-name, which is started if it has no checkpoint",
    )
    parser.add_argument(
        "--elastic",
        action="store_true",
        help="continue when ranks fail, leave or join; horovodrun needs --host-discovery-script",
    )
    return parser.parse_args(argv)


def read_plan(arguments: argparse.Namespace) -> tuple[Config, str, Path | None]:
    """Return `what_to_train`; on ranks that cannot, what is needed until rank 0 sends its own."""
    try:
        return what_to_train(arguments)
    except UserError as error:
        if arguments.elastic and arguments.resume:
            where = f"on {platform.node()}; each host of an elastic run needs the run's folder"
            raise CheckpointError(f"{error} ({where})") from None
        if arguments.elastic or os.environ.get("HOROVOD_RANK", "0") == "0":
            raise
        return Config(), "", None


def what_to_train(arguments: argparse.Namespace) -> tuple[Config, str, Path | None]:
    """Return the configuration, the run's name, and the checkpoint or folder to resume from.

    A resumed run keeps its own configuration; `--set` changes it. `--resume auto --run-name NAME`
    starts the run if it has no checkpoint yet, so that a job can be repeated without a change.

    Raises:
        CheckpointError: there is no such run, or the name is that of another run.
    """
    from horovod_lm.training.checkpoint import find_checkpoints
    from horovod_lm.training.run_dir import RunFolder, newest_run

    given, name = arguments.resume, arguments.run_name
    if not given:
        return _new_run(arguments)
    checkpoint = None
    if given == "auto":
        # Other settings may fit only the run's own configuration.
        paths = [one for one in arguments.overrides if one.startswith("paths.")]
        config = load_config(arguments.config, paths)
        name = name or newest_run(config)
        if name is None:
            raise CheckpointError("there is no run to resume: start one without --resume")
        run_dir = RunFolder.of(config, name).run_dir
    else:
        # Relative to the working directory or to the project: there is no configuration yet.
        run_dir = Path(given).resolve() if os.path.exists(given) else resolve_path(given)
        if run_dir.is_file():
            checkpoint, run_dir = run_dir, run_dir.parent.parent
    if not (run_dir / "config.yaml").is_file():
        if arguments.run_name and (given == "auto" or checkpoint):
            return _new_run(arguments, checkpoint)
        hint = "; add --config and --run-name of its run" if checkpoint else ""
        raise CheckpointError(f"{given} is not a run: {run_dir} has no config.yaml{hint}")
    config = load_config(run_dir / "config.yaml", arguments.overrides)
    checkpoint_dir = RunFolder.of(config, run_dir.name).checkpoint_dir
    if given == "auto" and arguments.run_name and not find_checkpoints(checkpoint_dir):
        return _new_run(arguments)
    name = name or run_dir.name
    if name != run_dir.name and (RunFolder.of(config, name).run_dir / "run.json").exists():
        raise CheckpointError(f"there is a run {name} already: choose another --run-name")
    return config, name, checkpoint or checkpoint_dir


def _new_run(
    arguments: argparse.Namespace, checkpoint: Path | None = None
) -> tuple[Config, str, Path | None]:
    from horovod_lm.training.run_dir import default_run_name

    config = load_config(arguments.config, arguments.overrides)
    return config, arguments.run_name or default_run_name(Path(arguments.config).stem), checkpoint


def summary(result: TrainingResult) -> str:
    """Return the results of a run, in a few lines."""
    return (
        f"{plural(result.steps, 'step')} in {format_seconds(result.seconds)},"
        f" {result.tokens_per_second:,.0f} tokens/s\n"
        f"training loss {result.first_loss:.4f} at the start, {result.train_loss:.4f} at the end;"
        f" validation loss {result.validation_loss:.4f}, perplexity {result.perplexity:.2f}\n"
        f"files in {shown(result.run_dir)}; to generate text:"
        f" {command('horovod_lm.generate', '--checkpoint', result.run_dir)}"
    )


if __name__ == "__main__":
    run_cli(main)
