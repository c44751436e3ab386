"""Adapters of experts that one layer computes at once: the same training and checkpoints as with a layer for each expert."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from formats.errors import UserError
from tests.trainer import small
from tests.trainer.peft.runs import whole
from tests.trainer.peft.test_experts import EXPERT_TENSORS, train

EP2 = {"expert_model_parallel_size": 2}
LAYOUTS = {"one": (1, {}), "ep2": (2, EP2), "ep4": (4, {"expert_model_parallel_size": 4})}

TARGETS = {"target_modules": ["linear_fc1", "linear_fc2", "linear_qkv", "router"]}


@pytest.fixture(scope="module", params=[False, True], ids=["fused", "canonical"])
def sequential(request, ranks, start, tmp_path_factory):
    """Six steps with a layer for each expert, and where they were saved after three, with and without expert parallelism."""
    folder, settings = tmp_path_factory.mktemp("adapter"), {"canonical": request.param} | TARGETS
    ((losses, norms, _),) = ranks.run(train, 1, start, {}, "LoRA", settings)
    for world, model in ((1, {}), (2, EP2)):
        ranks.run(train, world, start, model, "LoRA", settings, {"save": str(folder / str(world)), "stop": 3})
    return settings, folder, losses, norms


@pytest.mark.parametrize("layout", LAYOUTS)
def test_grouped_experts_go_on_where_single_ones_stopped(layout, ranks, start, sequential):
    (world, model), (settings, folder, losses, norms) = LAYOUTS[layout], sequential
    run = {"load": str(folder / str(min(world, 2))), "grouped": True}
    for resumed, resumed_norms, names in ranks.run(train, world, start, model, "LoRA", settings, run):
        assert resumed == pytest.approx(losses[3:], abs=1e-4)
        assert resumed_norms == pytest.approx(norms[3:], rel=1e-3)
        assert any(".experts.linear_fc1.adapter." in name for name in names)
        assert not any(".local_experts." in name for name in names)


def test_single_experts_go_on_where_grouped_ones_stopped(ranks, start, tmp_path, sequential):
    settings, folder = sequential[0], str(tmp_path)
    losses, norms, _ = ranks.run(train, 2, start, EP2, "LoRA", settings, {"grouped": True})[0]
    ranks.run(train, 2, start, EP2, "LoRA", settings, {"save": folder, "stop": 3, "grouped": True})
    for resumed, resumed_norms, _ in ranks.run(train, 2, start, EP2, "LoRA", settings, {"load": folder}):
        assert resumed == pytest.approx(losses[3:], abs=1e-4)
        assert resumed_norms == pytest.approx(norms[3:], rel=1e-3)


def test_the_keys_of_experts_are_megatrons(sequential):
    from megatron.core.dist_checkpointing import load_tensors_metadata

    from trainer import tensor_properties

    (settings, folder, *_) = sequential
    with tensor_properties.without_strides():
        stored = {name: tensor.global_shape for name, tensor in load_tensors_metadata(str(folder / "2" / "iter_0000003")).items()}
    for name, shape in EXPERT_TENSORS[settings["canonical"]].items():
        assert stored[f"decoder.layers.1.mlp.experts.experts.{name}"] == shape
    assert stored["decoder.layers.1.mlp.router.adapter.linear_out.weight"] == (4, 4)


INPUTS, OUTPUTS, TOKENS, SCALE = 8, 16, [3, 0, 4], 2.0


def _values(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _mine(whole, axis, stride, rank):
    """This rank's half of each of `stride` blocks along an axis."""
    return torch.cat([block.chunk(2, axis)[rank] for block in whole.chunk(stride, axis)], axis)


def _whole(row, canonical):
    """Weights of three experts, and what their adapters have, by the names of checkpoints."""
    first, fc1 = {"": OUTPUTS}, not row
    parts = {"adapter_gate.": OUTPUTS // 2, "adapter_up.": OUTPUTS // 2} if fc1 and canonical else first
    named = {}
    for seed, (part, rows) in enumerate(parts.items()):
        named |= {f"{part}linear_in": _values(3, 4, INPUTS, seed=seed), f"{part}linear_out": _values(3, rows, 4, seed=10 + seed)}
    return _values(3, OUTPUTS, INPUTS, seed=20), named


def _divided(folder, row, canonical):
    """A layer of three experts divided among two ranks: its output, gradients, and its shards in a checkpoint."""
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer import TransformerConfig

    from tests.trainer.peft import grouped_layers
    from trainer import parallel, peft
    from trainer.checkpoints.live import _of_state

    settings = small.settings(Path(folder), model__tensor_model_parallel_size=2, model__expert_tensor_parallel_size=2)
    with parallel.session(settings, "cpu"):
        config = TransformerConfig(num_layers=1, hidden_size=INPUTS, num_attention_heads=2, num_moe_experts=3,
                                   tensor_model_parallel_size=2, expert_tensor_parallel_size=2, gated_linear_unit=True,
                                   add_bias_linear=False)  # fmt: skip
        kind = grouped_layers.TERowParallelGroupedLinear if row else grouped_layers.TEColumnParallelGroupedLinear
        layer = kind(3, INPUTS, OUTPUTS, config=config, init_method=torch.nn.init.zeros_,
                     pg_collection=ProcessGroupCollection.use_mpu_process_groups())  # fmt: skip
        rank, (weights, named) = parallel_state.get_expert_tensor_parallel_rank(), _whole(row, canonical)
        for number, weight in enumerate(weights):
            getattr(layer, f"weight{number}").data.copy_(_mine(weight, 1 if row else 0, 1 if row else 2, rank))
        layer.requires_grad_(requires_grad=False)
        peft.LoRA(dim=4, alpha=8, canonical=canonical).transform(layer, f"layers.0.mlp.experts.linear_fc{2 if row else 1}")
        trained = {name.removesuffix(".weight"): parameter for name, parameter in layer.adapter.named_parameters()}
        assert trained.keys() == named.keys()
        for name, parameter in trained.items():
            cut = parameter.tensor_model_parallel
            parameter.data.copy_(
                _mine(named[name], parameter.partition_dim, parameter.partition_stride, rank) if cut else named[name]
            )
        tokens = _values(sum(TOKENS), INPUTS, seed=30)
        tokens = (tokens.chunk(2, 1)[rank].contiguous() if row else tokens).requires_grad_()
        output, _ = layer(tokens, TOKENS)
        upstream = _values(sum(TOKENS), OUTPUTS, seed=40)
        output.backward(upstream if row else _mine(upstream, 1, 2, rank))
        gradients = {name: (parameter.grad, parameter.tensor_model_parallel, parameter.partition_dim, parameter.partition_stride)
                     for name, parameter in trained.items()}  # fmt: skip
        shards = [(shard.name, shard.region, shard.data.clone(), shard.global_shape)
                  for shard in _of_state(layer.adapter.sharded_state_dict("mlp.experts.experts."))]  # fmt: skip
        return output.detach(), tokens.grad, gradients, shards


@pytest.mark.parametrize("canonical", [False, True], ids=["fused", "canonical"])
@pytest.mark.parametrize("row", [False, True], ids=["fc1", "fc2"])
def test_divided_experts_are_those_of_torch_merged(row, canonical, ranks, model_folder):
    """The dispatcher sums what divided experts answer, and the gradients of what they are given."""
    first, second = ranks.run(_divided, 2, str(model_folder("gqa")), row, canonical)
    weights, named = _whole(row, canonical)
    named = {name: torch.nn.Parameter(tensor) for name, tensor in named.items()}
    pairs = [(named[name], named[name.replace("_in", "_out")]) for name in named if name.endswith("linear_in")]
    merged = weights + SCALE * torch.cat([b @ a for a, b in pairs], dim=1)
    tokens = _values(sum(TOKENS), INPUTS, seed=30).requires_grad_()
    expected = torch.cat([part @ weight.t() for part, weight in zip(tokens.split(TOKENS), merged, strict=True)])
    expected.backward(_values(sum(TOKENS), OUTPUTS, seed=40))
    if row:
        output, for_input = first[0] + second[0], torch.cat((first[1], second[1]), 1)
    else:
        halves = [torch.cat(pair, 1) for pair in zip(first[0].chunk(2, 1), second[0].chunk(2, 1), strict=True)]
        output, for_input = torch.cat(halves, 1), first[1] + second[1]
    torch.testing.assert_close(output, expected.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(for_input, tokens.grad, rtol=1e-4, atol=1e-4)
    for name, parameter in named.items():
        torch.testing.assert_close(whole([first[2][name], second[2][name]]), parameter.grad, rtol=1e-4, atol=1e-4)
    for name, region, data, shape in (*first[3], *second[3]):
        expert, _, tensor = name.removeprefix("mlp.experts.").removesuffix(".weight").partition(".")
        assert shape == tuple(named[tensor].shape[1:])
        assert data.equal(named[tensor][int(expert)][region].detach())
    assert len({name for name, *_ in first[3]}) == 3 * len(named)


@pytest.mark.parametrize(("target", "what"), [("linear_fc1", "computes several experts at once"), ("router", "is a router")])
def test_dora_of_what_peft_has_lora_alone_for_is_refused(target, what, ranks, start):
    settings = {"target_modules": [f"*.mlp.*{target}"]}
    with pytest.raises(UserError, match=f"layers.0.mlp.*{target}` {what}, to which no DoRA can be added"):
        ranks.run(train, 1, start, {}, "DoRA", settings, {"grouped": True})


def _both_products(folder, device):
    """Outputs and gradients of a frozen layer of experts in bf16 with adapters: by one product, and by the layer itself."""
    from megatron.core.extensions import transformer_engine
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer import TransformerConfig

    from tests.trainer.peft import grouped_layers
    from trainer import parallel, peft
    from trainer.device import current
    from trainer.peft.grouped import GroupedLayer

    with parallel.session(small.settings(Path(folder), dist__device=device), device):
        config = TransformerConfig(num_layers=1, hidden_size=INPUTS, num_attention_heads=2, num_moe_experts=3, bf16=True,
                                   params_dtype=torch.bfloat16, add_bias_linear=False)  # fmt: skip
        given = {"config": config, "init_method": torch.nn.init.zeros_,
                 "pg_collection": ProcessGroupCollection.use_mpu_process_groups()}  # fmt: skip
        of_engine = {"bias": False, "skip_bias_add": False, "is_expert": True}
        layer = (
            transformer_engine.TEColumnParallelGroupedLinear(3, INPUTS, OUTPUTS, **given, **of_engine)
            if device == "gpu"
            else grouped_layers.TEColumnParallelGroupedLinear(3, INPUTS, OUTPUTS, **given)
        ).to(current(), torch.bfloat16)
        weights = _values(3, OUTPUTS, INPUTS, seed=20).to(current(), torch.bfloat16)
        for number, weight in enumerate(weights):
            getattr(layer, f"weight{number}").data.copy_(weight)
        layer.requires_grad_(requires_grad=False)
        peft.LoRA(dim=8, alpha=8).transform(layer, "layers.0.mlp.experts.linear_fc1")
        for seed, parameter in enumerate(layer.adapter.parameters()):
            parameter.data.copy_(_values(*parameter.shape, seed=seed))
        answers = []
        for one_product in (True, False):
            GroupedLayer._is_one_product = lambda *_, chosen=one_product: chosen
            layer.zero_grad()
            tokens = _values(sum(TOKENS), INPUTS, seed=30).to(current(), torch.bfloat16).requires_grad_()
            output, _ = layer(tokens, TOKENS)
            output.float().square().sum().backward()
            answers.append([output.detach(), tokens.grad, *(parameter.grad for parameter in layer.adapter.parameters())])
        assert all(weight.equal(getattr(layer, f"weight{number}").data) for number, weight in enumerate(weights))
        assert layer.weight1.data_ptr() - layer.weight0.data_ptr() == 2 * INPUTS * OUTPUTS
        return [[tensor.float().cpu() for tensor in tensors] for tensors in answers]


def one_product_is_that_of_each(ranks, model_folder, device):
    ((torchs, layers),) = ranks.run(_both_products, 1, str(model_folder("gqa")), device)
    for ours, theirs in zip(torchs, layers, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2 * theirs.abs().max().item())


def test_one_product_for_all_experts_is_that_of_each(ranks, model_folder):
    one_product_is_that_of_each(ranks, model_folder, "cpu")
