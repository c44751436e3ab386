"""What is captured as a CUDA graph, and what is refused: without a GPU. `test_gpu_cuda_graph` captures steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from formats.errors import UserError
from tests import models
from tests.trainer import small
from tests.trainer.settings import HOPPER
from trainer.cuda_graph import fix_shapes
from trainer.layers.token_counts import TokenCounts
from trainer.loss import Inputs
from trainer.peft import LoRA
from trainer.peft.grouped import grouped_linear
from trainer.settings.resolve import resolve

GRAPH = {"model__cuda_graph_impl": "full_iteration"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    from tests.converter.family_suite import small_model

    made = tmp_path_factory.mktemp("models")
    models.save(models.build("gqa"), made / "llama")
    models.save(small_model("qwen3_moe", dtype="float32"), made / "experts")
    return made


def resolved(folder: Any, device: str = "gpu", world_size: int = 1, **changes: Any) -> Any:
    defaults = {**GRAPH, "mixed_precision": "bf16_mixed", "dist__device": device, "dataset": small.FixedTokens(256, 128)}
    settings = small.settings(folder, **{**defaults, **changes})
    return resolve(settings, world_size=world_size, device=device, machine=HOPPER if device == "gpu" else None).config


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model__cuda_graph_impl": "local"}, "graphs of single layers"),
        ({"model__hidden_dropout": 0.1}, "`model.hidden_dropout=0.1`"),
        ({"model__attention_dropout": 0.1}, "`model.attention_dropout=0.1`"),
        ({"peft": LoRA(dropout=0.1)}, "`peft.dropout=0.1`"),
        (
            {"model__recompute_granularity": "full", "model__recompute_method": "uniform", "model__recompute_num_layers": 1},
            "`model.recompute_granularity=full`",
        ),
        ({"mixed_precision": "bf16_with_fp8_current_scaling_mixed"}, "`mixed_precision=bf16_with_fp8_current_scaling_mixed`"),
        ({"mixed_precision": "fp16_mixed"}, "`mixed_precision=fp16_mixed`"),
        ({"dataset": small.FixedTokens(256, 96)}, "`dataset.sequence_length=96`"),
        ({"ddp__check_for_nan_in_grad": True}, "`ddp.check_for_nan_in_grad=True`"),
    ],
)
def test_what_a_graph_would_compute_otherwise_is_refused_by_name(changes, named, folders):
    with pytest.raises(UserError) as refused:
        resolved(folders / "llama", **changes)
    assert "`model.cuda_graph_impl` is" in str(refused.value)
    assert named in str(refused.value)
    assert "leave" in refused.value.hint


@pytest.mark.parametrize(
    ("world_size", "changes", "named"),
    [
        (2, {}, "`2` processes"),
        (4, {"model__pipeline_model_parallel_size": 2}, "`4` processes"),
    ],
)
def test_several_processes_are_refused(world_size, changes, named, folders):
    with pytest.raises(UserError, match=r"`model\.cuda_graph_impl` is") as refused:
        resolved(folders / "llama", world_size=world_size, **changes)
    assert named in str(refused.value)


@pytest.mark.parametrize(
    ("world_size", "changes", "named"),
    [
        (1, {}, "experts whose weights are trained"),
        (1, {"peft": LoRA(dim=12)}, "`peft.dim=12`"),
        (1, {"peft": LoRA(dim=8), "model__moe_expert_capacity_factor": 1.5}, "`model.moe_expert_capacity_factor=1.5`"),
        (2, {"peft": LoRA(dim=8), "model__expert_model_parallel_size": 2}, "`2` processes"),
    ],
)
def test_experts_whose_tokens_the_cpu_must_count_are_refused(world_size, changes, named, folders):
    with pytest.raises(UserError, match=r"`model\.cuda_graph_impl` is") as refused:
        resolved(folders / "experts", world_size=world_size, **changes)
    assert named in str(refused.value)


def test_adapters_of_frozen_experts_and_dense_models_are_captured(folders):
    assert resolved(folders / "experts", peft=LoRA(dim=8)).model.cuda_graph_impl == "full_iteration"
    assert resolved(folders / "llama").model.cuda_graph_impl == "full_iteration"


def test_a_cpu_captures_nothing(folders):
    with pytest.raises(UserError, match="does not work on the CPU: CUDA captures it"):
        resolved(folders / "llama", device="cpu", mixed_precision="fp32")


def test_a_forward_step_of_ones_own_is_refused():
    from trainer import cuda_graph
    from trainer.model import GPTModelProvider

    model = GPTModelProvider(num_layers=1, hidden_size=8, num_attention_heads=1)
    cuda_graph.refuse(model)
    model.cuda_graph_impl = "full_iteration"
    with pytest.raises(UserError, match="a forward step of its own"):
        cuda_graph.refuse(model)


def test_inputs_of_packed_rows_get_shapes_that_do_not_depend_on_their_examples():
    tokens = torch.arange(16).reshape(1, 16)
    inputs = Inputs({"tokens": tokens, "cu_seqlens": torch.tensor([0, 5, 16], dtype=torch.int32)}, 11)
    fixed = fix_shapes(inputs, segments=4, length=8)
    assert fixed.tensors["cu_seqlens"].tolist() == [0, 5, 16, 16, 16]
    assert fixed.tensors["cu_seqlens"].dtype == torch.int32
    assert fixed.max_seqlen == 8
    alone = fix_shapes(inputs, segments=2, length=16)  # a row by itself: the bound is not the number of all tokens
    assert alone.tensors["cu_seqlens"].tolist() == [0, 5, 16]
    assert alone.max_seqlen > 16


def test_inputs_without_segments_stay_as_they_are():
    inputs = Inputs({"tokens": torch.zeros(2, 8)})
    assert fix_shapes(inputs, segments=4, length=8) is inputs


def test_products_of_experts_are_the_same_whether_the_gpu_or_the_cpu_counts_tokens():
    made = torch.Generator().manual_seed(0)
    tokens, weights = torch.randn(7, 8, generator=made).bfloat16(), torch.randn(3, 16, 8, generator=made).bfloat16()
    counts = torch.tensor([2, 0, 5])
    assert torch.equal(grouped_linear(tokens, weights, TokenCounts(counts)), grouped_linear(tokens, weights, counts.tolist()))
