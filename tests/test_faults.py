"""Fourteen faults that earlier code of this kind had, and the test that guards against each."""

from __future__ import annotations

import ast
import re

import pytest

from horovod_lm.training.metrics import read_metrics
from tests.conftest import ROOT

TESTS = ROOT / "tests"

GUARDS = {
    "1: bfloat16, so no scaler, and scaler.scale called all the same": (
        "training/test_optimizer.py::test_one_code_path_for_every_precision_and_a_scaler_for_float16_only"
    ),
    "2: accumulation that Horovod is not told of": (
        "utils/test_distributed.py"
        "::test_gradients_are_summed_over_passes_averaged_over_ranks_and_reduced_once"
    ),
    "3: clipping before synchronize()": ("training/test_equivalence.py::test_two_ranks_equal_one"),
    "4: helpers that catch ImportError only": (
        "utils/test_distributed.py::test_every_helper_works_before_init_and_without_horovod"
    ),
    "5: checkpointing with a lambda that closes over the loop variable": (
        "models/test_transformer_lm.py::test_gradient_checkpointing_changes_no_bit"
    ),
    "6: resume that skips to the next epoch": (
        "training/test_resume.py::test_killed_in_an_epoch_and_resumed_is_bit_equal"
    ),
    "6: any checkpoint's loss taken as the best": (
        "training/test_resume.py::test_best_loss_is_not_the_loss_of_the_checkpoint_that_was_loaded"
    ),
    "7: mean(exp(loss)) called perplexity": (
        "training/test_evaluate.py"
        "::test_sums_of_parts_add_up_and_perplexity_is_exp_of_the_mean_over_tokens"
    ),
    "7: intervals that nobody reads, or that accumulation divides": (
        "test_faults.py::test_intervals_count_optimizer_steps"
    ),
    "8: data_dir written here and read there": (
        "utils/test_config.py"
        "::test_relative_paths_start_at_the_project_root_from_any_working_directory"
    ),
    "9: defaults in the documentation that the code has not": (
        "utils/test_config.py::test_defaults_are_the_contracts"
    ),
    "10: NumPy scalars in a checkpoint": (
        "training/test_checkpoint.py::test_numpy_scalars_come_back_as_python_numbers"
    ),
    "11: splits drawn without a shared seed": (
        "data/test_loaders.py::test_fault_11_every_rank_has_the_same_split"
    ),
    "12: with one worker, a stand-in that trains nothing": (
        "test_train.py::test_every_way_to_start_trains_the_same_loop"
    ),
    "13: bool masks as persistent buffers": (
        "models/test_transformer_lm.py::test_state_dict_holds_parameters_only_all_of_them_float"
    ),
    "14: a worker that dies and leaves the others blocked": (
        "test_train.py::test_a_failing_rank_ends_the_job_and_leaves_a_checkpoint_that_loads"
    ),
}


@pytest.mark.parametrize("fault", GUARDS)
def test_every_fault_has_its_guard(fault):
    file, _, name = GUARDS[fault].partition("::")
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_no_fault_is_forgotten():
    assert {int(fault.split(":")[0]) for fault in GUARDS} == set(range(1, 15))


def test_intervals_count_optimizer_steps(tiny_project, train):
    finished = train(
        "--config", "configs/tiny.yaml", "--run-name", "intervals",
        "--set", "training.gradient_accumulation_steps=2", "--set", "training.max_steps=10",
        "--set", "training.eval_interval=4", "--set", "training.log_interval=5",
        "--set", "training.checkpoint_interval=3", "--set", "training.keep_last_checkpoints=2",
    )  # fmt: skip
    folder = tiny_project / "runs" / "intervals"
    assert re.findall(r"^step (\d+)/10 ", finished.output, re.MULTILINE) == ["1", "5", "10"]
    assert [row["step"] for row in read_metrics(folder, "validation")] == [4, 8, 10]
    kept = {path.name for path in (folder / "checkpoints").iterdir()}
    assert kept == {
        "best_model.pt", "final_model.pt",
        "checkpoint_epoch0_step6.pt", "checkpoint_epoch0_step9.pt",
    }  # fmt: skip
