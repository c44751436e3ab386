"""On a GPU: gradients added within the products that compute them train as those added afterwards. Left out by `make test`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.trainer import small

pytestmark = pytest.mark.gpu

GPU = {"dist__device": "gpu", "train__train_iters": 6, "train__global_batch_size": 8}


def train(path, changes):
    """Run on this rank: the losses and gradient norms of a few steps of several microbatches."""
    from trainer.loop import pretrain

    history = small.History()
    pretrain(small.settings(Path(path), **{**GPU, **changes}), callbacks=[history])
    return history.losses, history.grad_norms


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_moe", "deepseek_v3"])
def test_fused_gradients_train_as_others_do(family, ranks, family_folder):
    """Gemma 2's output layer has the weight of its embedding."""
    (fused,), (afterwards,) = (
        ranks.run(train, 1, str(family_folder(family)), {"model__gradient_accumulation_fusion": chosen})
        for chosen in (True, False)
    )
    assert fused[0] == pytest.approx(afterwards[0], abs=1e-4)
    assert fused[1] == pytest.approx(afterwards[1], rel=1e-3)


def test_a_step_that_runs_the_model_twice_loses_no_gradient(ranks, family_folder):
    """In bf16; the loss of both passes together is twice the loss, and so is its gradient."""
    path = str(family_folder("llama"))
    for precision in ("bf16_mixed", "bf16_with_fp8_current_scaling_mixed"):
        changes = {"mixed_precision": precision, "dataset__sequence_length": 128}
        (once,), (twice,) = ranks.run(train, 1, path, changes), ranks.run(train_twice, 1, path, changes)
        assert twice[1][0] == pytest.approx(2 * once[1][0], rel=2e-2)


def train_twice(path, changes):
    """Run on this rank: each microbatch runs the model twice."""
    from trainer.loop import pretrain
    from trainer.loss import forward_step

    def both(batches, model):
        batch = next(batches)
        (first, loss), (second, _) = forward_step(iter([batch]), model), forward_step(iter([batch]), model)
        return first + second, loss

    history = small.History()
    pretrain(small.settings(Path(path), **{**GPU, **changes}), both, callbacks=[history])
    return history.losses, history.grad_norms
