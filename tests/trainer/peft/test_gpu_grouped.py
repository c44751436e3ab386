"""On a GPU: adapters of experts that Transformer Engine computes at once are trained as those of one layer for each expert."""

from __future__ import annotations

import pytest

from tests.trainer.peft.test_experts import train

pytestmark = pytest.mark.gpu

TARGETS = {"target_modules": ["linear_fc1", "linear_fc2", "linear_qkv", "router"]}


@pytest.mark.parametrize("canonical", [False, True], ids=["fused", "canonical"])
def test_grouped_experts_go_on_where_single_ones_stopped(canonical, ranks, tmp_path):
    start, saved, told = str(tmp_path / "start"), str(tmp_path / "adapter"), {"canonical": canonical} | TARGETS
    ranks.run(train, 1, None, {}, None, {}, {"save": start})
    ((losses, norms, _),) = ranks.run(train, 1, start, {}, "LoRA", told)
    ranks.run(train, 1, start, {}, "LoRA", told, {"save": saved, "stop": 3})
    grouped = {"moe_grouped_gemm": True}
    ((found, found_norms, names),) = ranks.run(train, 1, start, grouped, "LoRA", told, {"load": saved})
    assert found == pytest.approx(losses[3:], abs=2e-3)  # Transformer Engine's kernels, in fp32 without TF32
    assert found_norms == pytest.approx(norms[3:], rel=2e-2)
    assert any(".experts.linear_fc1.adapter." in name for name in names)


EXPERTS, INPUTS, OUTPUTS, TOKENS = 4, 128, 256, [40, 0, 17, 71]


def _both_ways():
    """Outputs and gradients of a frozen layer of experts with adapters: by one product of torch, and by Transformer Engine."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.extensions.transformer_engine import TEColumnParallelGroupedLinear
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig

    from trainer import peft
    from trainer.peft.grouped import GroupedLayer

    torch.cuda.set_device(0)
    torch.distributed.init_process_group("nccl", init_method="tcp://127.0.0.1:29671", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    config = TransformerConfig(num_layers=1, hidden_size=INPUTS, num_attention_heads=2, num_moe_experts=EXPERTS, bf16=True,
                               params_dtype=torch.bfloat16, add_bias_linear=False)  # fmt: skip
    layer = TEColumnParallelGroupedLinear(EXPERTS, INPUTS, OUTPUTS, config=config, init_method=torch.nn.init.normal_, bias=False,
                                          skip_bias_add=False, is_expert=True,
                                          pg_collection=ProcessGroupCollection.use_mpu_process_groups())  # fmt: skip
    before = [getattr(layer, f"weight{number}").data.clone() for number in range(EXPERTS)]
    layer.requires_grad_(requires_grad=False)
    peft.LoRA(dim=8, alpha=16).transform(layer, "layers.0.mlp.experts.linear_fc1")
    for parameter in layer.adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    data = torch.randn(sum(TOKENS), INPUTS, device="cuda", dtype=torch.bfloat16)
    found = []
    for one_product in (True, False):
        if not one_product:
            GroupedLayer._is_one_product = lambda *_: False
        tokens = data.clone().requires_grad_()
        layer.zero_grad()
        output, _ = layer(tokens, TOKENS)
        output.float().square().sum().backward()
        found.append([output.detach(), tokens.grad, *(parameter.grad for parameter in layer.adapter.parameters())])
    assert all(weight.equal(getattr(layer, f"weight{number}")) for number, weight in enumerate(before))
    assert layer.weight1.data_ptr() - layer.weight0.data_ptr() == 2 * INPUTS * OUTPUTS
    return [[tensor.float().cpu() for tensor in tensors] for tensors in found]


def test_one_product_for_all_experts_is_that_of_each(ranks):
    import torch

    ((torchs, engines),) = ranks.run(_both_ways, 1)
    for ours, theirs in zip(torchs, engines, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2 * theirs.abs().max().item())
