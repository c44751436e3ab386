"""A loss that is no number ends the run on all ranks before it is logged or saved."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from formats.errors import UserError
from tests.models import tree
from tests.trainer import small


def _train(folder, changes, factor, rank=1):
    """Train with a loss that is multiplied by `factor` on one rank at step 3; what this rank is told, and if it tells it."""
    from trainer.loop import pretrain
    from trainer.loss import forward_step

    steps = small.History()

    def spoilt(batches, model):
        output, loss = forward_step(batches, model)
        bad = os.environ["RANK"] == str(rank) and len(steps.losses) == 2
        return output * (factor if bad else 1.0), loss

    try:
        pretrain(small.settings(Path(folder), **changes), spoilt, callbacks=[steps])
    except UserError as error:
        return str(error), error.told


def test_nan_on_one_rank_ends_all_of_them_with_step_rank_and_last_good_checkpoint(ranks, model_folder, tmp_path):
    for factor in (float("nan"), float("inf"), float("-inf")):
        root = tmp_path / str(factor)
        changes = {"checkpoint__save": str(root), "checkpoint__save_interval": 1, "checkpoint__async_save": factor > 0}
        errors = ranks.run(_train, 2, str(model_folder()), changes, factor)
        assert (
            errors[0][0]
            == errors[1][0]
            == (
                f"the loss of step 3 is NaN or Inf on rank 1; the last good checkpoint is `{root}/iter_0000002`\n\n"
                "hint: look at the data of this step and at `optimizer.lr`; the weights of this step were not saved"
            )
        )
        assert sorted(silent for _, silent in errors) == [False, True]
        assert {name.partition("/")[0] for name in tree(root)} == {
            "iter_0000001",
            "iter_0000002",
            "latest_checkpointed_iteration.txt",
            "latest_train_state.pt",
            "metrics.jsonl",
        }


def test_nan_before_any_checkpoint_says_that_there_is_none(ranks, model_folder):
    errors = ranks.run(_train, 2, str(model_folder()), {}, float("nan"), 0)
    assert errors[0][0].startswith("the loss of step 3 is NaN or Inf on rank 0; no checkpoint was saved yet\n")


class _NoGradient(torch.autograd.Function):
    """The same number forwards, none backwards."""

    @staticmethod
    def forward(_ctx, output):
        return output.clone()

    @staticmethod
    def backward(_ctx, gradient):
        return gradient * float("nan")


def _train_spoilt(folder, changes, *, gradients):
    """Train with no number backwards at step 3, or in evaluations; what this rank is told."""
    from trainer.loop import pretrain
    from trainer.loss import forward_step

    steps = small.History()

    def spoilt(batches, model):
        output, loss = forward_step(batches, model)
        if gradients:
            return (_NoGradient.apply(output) if len(steps.losses) == 2 else output), loss
        return output * (1.0 if model.training else float("nan")), loss

    try:
        pretrain(small.settings(Path(folder), **changes), spoilt, callbacks=[steps])
    except UserError as error:
        return str(error)


def _gradients(folder, changes):
    return _train_spoilt(folder, changes, gradients=True)


def _evaluations(folder, changes):
    return _train_spoilt(folder, changes, gradients=False)


def test_gradients_that_are_no_numbers_are_never_saved(ranks, model_folder, tmp_path):
    changes = {
        "checkpoint__save": str(tmp_path),
        "checkpoint__save_interval": 1,
        "train__train_iters": 3,
        "scheduler__lr_warmup_iters": 0,
    }
    messages = ranks.run(_gradients, 2, str(model_folder()), changes)
    assert messages[0] == messages[1]
    assert messages[0].startswith(
        f"the gradient norm of step 3 is NaN or Inf; the last good checkpoint is `{tmp_path}/iter_0000002`"
    )
    assert not (tmp_path / "iter_0000003").exists()


def test_an_evaluation_that_is_no_number_ends_all_ranks_also_where_one_stage_knows(ranks, model_folder):
    changes = {
        "model__pipeline_model_parallel_size": 2,
        "validation__eval_iters": 1,
        "validation__eval_interval": 2,
        "train__train_iters": 5,
    }
    messages = ranks.run(_evaluations, 2, str(model_folder()), changes)
    assert messages[0] == messages[1]
    assert messages[0].startswith("the validation loss after step 2 is NaN or Inf; no checkpoint was saved yet")
