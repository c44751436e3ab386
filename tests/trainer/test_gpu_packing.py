"""On GPUs with Transformer Engine: packed rows learn what examples learn alone, at every layout. Left out by `make test`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests import models
from tests.trainer.chat import packed

pytestmark = pytest.mark.gpu

LONGEST = 64
SHAPE = {
    "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 4096, "max_position_embeddings": 512,
}  # fmt: skip
SLOWER = {"optimizer__lr": 1e-3, "optimizer__min_lr": 1e-4}  # a larger step makes more of what rounding began
PP2 = {"model__pipeline_model_parallel_size": 2}
LAYOUTS = {
    "one": (1, {}),
    "two_rows_at_once": (1, {"train__micro_batch_size": 2}),
    "recompute": (
        1,
        {"model__recompute_granularity": "full", "model__recompute_method": "uniform", "model__recompute_num_layers": 1},
    ),
    "dp2": (2, {"ddp__use_distributed_optimizer": True}),
    "tp2_sp": (2, {"model__tensor_model_parallel_size": 2, "model__sequence_parallel": True}),
    "pp2": (2, PP2),
    "pp2_two_rows_at_once": (2, {**PP2, "train__micro_batch_size": 2}),
    "vpp4": (2, {**PP2, "model__virtual_pipeline_model_parallel_size": 4}),  # six of eight stages are in the middle
    "cp2": (2, {"model__context_parallel_size": 2}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small Llama that Transformer Engine's kernels take."""
    return models.save(models.build("gqa", **SHAPE), tmp_path_factory.mktemp("gpu") / "model")


def given() -> packed.Given:
    """Four examples of up to `LONGEST` tokens in a row."""
    return packed.Given(sequence_length=packed.EACH * LONGEST, longest=LONGEST)


def told(precision: str, **changes: Any) -> dict[str, Any]:
    return {"dist__device": "gpu", "mixed_precision": precision, "dataset": given(), **SLOWER, **changes}


@pytest.fixture(scope="module")
def alone(ranks, folder):
    """The run in bf16 with one example in each row, on one GPU."""
    (seen,) = ranks.run(packed.train, 1, str(folder), False, told("bf16_mixed"))
    return seen


@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_losses_and_gradients_are_those_of_examples_alone(layout, ranks, folder, alone):
    world, changes = LAYOUTS[layout]
    if torch.cuda.device_count() < world:
        pytest.skip(f"needs {world} GPUs")
    for seen in ranks.run(packed.train, world, str(folder), True, told("bf16_mixed", **changes)):
        worst = max(abs(actual - expected) for actual, expected in zip(seen.losses, alone.losses, strict=True))
        print(layout, "largest difference of losses", worst, "gradient norms", seen.grad_norms, alone.grad_norms)
        # Neighbours in bf16 lie 2^-8 apart; sums in another order may end two of them away.
        assert seen.losses == pytest.approx(alone.losses, rel=2**-7)
        assert seen.grad_norms == pytest.approx(alone.grad_norms, rel=2**-5)
        assert seen.evaluations == [(split, pytest.approx(loss, rel=2**-7)) for split, loss in alone.evaluations]
        if layout == "one":
            for name, gradient in alone.gradients.items():
                similar = torch.nn.functional.cosine_similarity(seen.gradients[name].flatten(), gradient.flatten(), dim=0)
                assert similar > 0.999, name


def test_fp32_packed_rows_on_the_gpu_follow_examples_alone_on_the_cpu(ranks, folder):
    (cpu,) = ranks.run(packed.train, 1, str(folder), False, {**told("fp32"), "dist__device": "cpu"})
    (gpu,) = ranks.run(packed.train, 1, str(folder), True, told("fp32"))
    assert gpu.losses == pytest.approx(cpu.losses, abs=1e-3)
    assert gpu.grad_norms == pytest.approx(cpu.grad_norms, rel=1e-2)


def test_an_example_on_the_gpu_does_not_see_its_neighbours(ranks, folder):
    """Had examples seen each other, the losses of the first step would be others: more than rounding explains."""
    (kept_apart,) = ranks.run(packed.train, 1, str(folder), True, told("bf16_mixed", train__train_iters=5))
    (mixed,) = ranks.run(_as_one, 1, str(folder), told("bf16_mixed", train__train_iters=5))
    (alone,) = ranks.run(packed.train, 1, str(folder), False, told("bf16_mixed", train__train_iters=5))
    assert kept_apart.losses[0] == pytest.approx(alone.losses[0], rel=2**-10)
    assert abs(mixed.losses[0] - alone.losses[0]) > 8 * abs(kept_apart.losses[0] - alone.losses[0])


def _as_one(folder: str, changes: dict[str, Any]) -> packed.Seen:
    """A packed run that is not told where examples end."""
    from pathlib import Path

    from tests.trainer import small
    from trainer.loop import pretrain
    from trainer.loss import forward_step

    def without_segments(batches: Any, model: Any) -> Any:
        batch = dict(next(batches)) if batches is not None else {}
        batch["segment_ids"] = torch.zeros_like(batch["segment_ids"])
        return forward_step(iter([batch]), model)

    seen = packed.Seen()
    rows = {"train__global_batch_size": 16 // packed.EACH}
    pretrain(small.settings(Path(folder), **{**changes, **rows}), without_segments, callbacks=[seen])
    return seen
