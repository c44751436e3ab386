"""On GPUs: steps that are captured as a CUDA graph compute what the same steps do kernel by kernel. Left out by `make test`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from formats.errors import UserError
from tests import models
from tests.trainer import small
from tests.trainer.chat import packed
from trainer.data.chat.dataset import ExampleDataset
from trainer.data.chat.packing import Rows

pytestmark = pytest.mark.gpu

GRAPH = {"dist__device": "gpu", "model__cuda_graph_impl": "full_iteration", "model__cuda_graph_warmup_steps": 1}
NEVER = {**GRAPH, "model__cuda_graph_warmup_steps": 1000}
"""Inputs have the same fixed shapes, and no step is captured."""

LENGTH = 128
SHAPE = {
    "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 4096, "max_position_embeddings": 1024,
}  # fmt: skip
EXPERTS = {**SHAPE, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256}


@dataclass
class Captured(small.History):
    """A history with the work of each step, and how many times the run had captured a graph after it."""

    work: list[tuple[float, float]] = field(default_factory=list)
    graphs: list[int] = field(default_factory=list)
    last: Any = None
    """The room for segments in the latest graph."""

    def on_step(self, run: Any, step: Any) -> None:
        super().on_step(run, step)
        self.work.append(step.work)
        graph = run.step_graph
        new = graph is not None and graph._graph is not None and graph._segments != self.last
        self.last = graph._segments if new else self.last
        self.graphs.append((self.graphs or [0])[-1] + new)


@dataclass(kw_only=True)
class Growing(packed.Given):
    """Rows of 1, 2, … 12 examples, a pair of each number: later rows have more segments than a graph of earlier ones has room
    for."""

    sequence_length: int = 12 * 64
    longest: int = 64

    def build(self, tokenizer: Any, vocab_size: int, samples: tuple[int, int, int]) -> Any:
        bounds = np.cumsum([0, *np.repeat(np.arange(1, 13), 2)])
        rows, count = Rows(np.arange(bounds[-1]), bounds), int(bounds[-1])
        options = {"sequence_length": self.sequence_length, "packed": True, "multiple": 1, "seed": 1}
        made = [
            ExampleDataset(packed.Drawn(count, longest=64), np.arange(count), rows=rows, shuffled=False, **options)
            for _ in samples
        ]
        return tuple(dataset.take(number) if number else None for dataset, number in zip(made, samples, strict=True))


def train(path: str, changes: dict[str, Any]) -> Captured:
    """Train on this rank for six steps of two microbatches."""
    from trainer.loop import pretrain

    seen = Captured()
    defaults = {
        "train__train_iters": 6, "train__global_batch_size": 4, "train__micro_batch_size": 2, "validation__eval_interval": 2,
        "validation__eval_iters": 1,
    }  # fmt: skip
    config = small.settings(Path(path), **{**defaults, **changes})
    if "dataset" not in changes:
        config.dataset.sequence_length = LENGTH
    pretrain(config, callbacks=[seen])
    return seen


def assert_same(captured: Captured, plain: Captured) -> None:
    print("losses", captured.losses, plain.losses, "norms", captured.grad_norms, plain.grad_norms)
    assert captured.graphs[-1] > 0
    assert plain.graphs[-1] == 0
    assert captured.losses == plain.losses
    assert captured.grad_norms == plain.grad_norms
    assert captured.evaluations == plain.evaluations
    assert captured.work == plain.work


@pytest.mark.parametrize("precision", ["fp32", "bf16_mixed"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
def test_a_captured_step_trains_as_its_kernels_do(family, precision, ranks, family_folder):
    path, settings = str(family_folder(family)), {"mixed_precision": precision}
    (captured,), (plain,) = (ranks.run(train, 1, path, {**settings, **chosen}) for chosen in (GRAPH, {"dist__device": "gpu"}))
    assert_same(captured, plain)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Models that Transformer Engine's kernels take, one of them with experts."""
    made = tmp_path_factory.mktemp("gpu")
    models.save(models.build("gqa", **SHAPE), made / "dense")
    from tests.converter.family_suite import small_model

    experts = small_model("qwen3_moe", dtype="bfloat16", **EXPERTS)
    experts.config.eos_token_id = experts.generation_config.eos_token_id = 0
    models.save(experts, made / "experts")
    return made


@pytest.mark.parametrize("targets", ["all", "attention"])
@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_adapters_on_packed_rows_are_trained_the_same_and_captured_again_for_more_segments(kind, targets, ranks, folders):
    from trainer.peft import LoRA

    settings = {
        "mixed_precision": "bf16_mixed", "dataset": Growing(), "train__train_iters": 6, "train__global_batch_size": 4,
        "peft": LoRA(dim=8) if targets == "all" else LoRA(dim=8, target_modules=("linear_qkv", "linear_proj")),
        "checkpoint__pretrained_checkpoint": str(folders / kind), "validation__eval_iters": 1, "optimizer__lr": 1e-3,
    }  # fmt: skip
    for rows in (1, 2):
        (captured,), (plain,) = (
            ranks.run(train, 1, str(folders / kind), {**settings, "train__micro_batch_size": rows, **chosen})
            for chosen in (GRAPH, NEVER)
        )
        print(kind, targets, rows, captured.graphs)
        assert captured.graphs[-1] > 1
        assert captured.losses == pytest.approx(plain.losses, abs=1e-4)
        assert captured.grad_norms == pytest.approx(plain.grad_norms, rel=1e-3)
        assert captured.work == plain.work
        assert captured.layers == [pytest.approx(layers, rel=1e-2) for layers in plain.layers]


def test_a_captured_run_resumes_to_the_bit(ranks, folders, tmp_path):
    path, settings = str(folders / "dense"), {**GRAPH, "mixed_precision": "bf16_mixed", "train__train_iters": 6}
    (whole,) = ranks.run(train, 1, path, settings)
    saved = {**settings, "checkpoint__save": str(tmp_path / "run")}
    (first,) = ranks.run(train, 1, path, {**saved, "train__exit_interval": 3})
    (second,) = ranks.run(train, 1, path, {**saved, "checkpoint__load": saved["checkpoint__save"]})
    assert first.losses + second.losses == whole.losses
    assert first.grad_norms + second.grad_norms == whole.grad_norms


def test_a_step_that_waits_for_the_gpu_is_refused(ranks, family_folder):
    (message,) = ranks.run(refused, 1, str(family_folder("llama")))
    assert "cannot be captured as a CUDA graph" in message
    assert "leave `model.cuda_graph_impl` out" in message


def refused(path: str) -> str:
    """Run on this rank: a hook reads a number from the GPU within the step."""

    class Waits(small.History):
        def on_start(self, run: Any) -> None:
            run.chunks[0].register_forward_hook(lambda _module, _inputs, output: output.sum().item() and None)

    from trainer.loop import pretrain

    with pytest.raises(UserError) as raised:
        pretrain(small.settings(Path(path), **GRAPH), callbacks=[Waits()])
    return str(raised.value)
