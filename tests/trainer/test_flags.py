"""Options of other programs on `mbtrain`'s command line: the error says what to write."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from trainer.cli import main


@pytest.mark.parametrize(
    ("words", "option", "setting"),
    [
        (["--tp", "2"], "--tp", "model.tensor_model_parallel_size=2"),
        (["--tensor-model-parallel-size=4"], "--tensor-model-parallel-size", "model.tensor_model_parallel_size=4"),
        (["--learning_rate", "3e-4"], "--learning_rate", "optimizer.lr=3e-4"),
        (["--max-steps", "5", "train.micro_batch_size=2"], "--max-steps", "train.train_iters=5"),
        (["--sequence-parallel"], "--sequence-parallel", "model.sequence_parallel=true"),
    ],
)
def test_an_option_of_another_program_is_told_as_the_setting_that_it_is(words: list[str], option: str, setting: str) -> None:
    refused = CliRunner().invoke(main, ["pretrain", "llama_tiny", *words])
    assert refused.exit_code == 2
    assert refused.stderr.splitlines()[-1] == f"Error: there is no option `{option}`; write `{setting}`"


def test_an_option_like_no_setting_stays_what_it_is() -> None:
    refused = CliRunner().invoke(main, ["show", "llama_tiny", "--hepl"])
    assert (refused.exit_code, "Did you mean" in refused.stderr) == (2, True)


def test_a_command_that_there_is_not_suggests_the_nearest() -> None:
    refused = CliRunner().invoke(main, ["pretrian", "llama_tiny"])
    assert (refused.exit_code, refused.stderr.splitlines()[-1]) == (
        2,
        "Error: there is no command `pretrian`; did you mean `pretrain`?",
    )


def test_a_process_for_each_gpu_needs_gpus() -> None:
    refused = CliRunner().invoke(main, ["pretrain", "llama_tiny", "--nproc", "gpu"])
    assert (refused.exit_code, refused.stderr.splitlines()[-1]) == (
        2,
        "Error: Invalid value for '--nproc': torch finds no GPU on this machine",
    )
