"""megatron-core reads the checkpoints that we write, and a fused adapter computes there what it computes in PEFT."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from converter import hf_to_mcore
from converter.adapters.convert import adapter_to_hf, adapter_to_mcore
from tests.converter.adapters.made import TOKENS, logits, with_adapter
from tests.megatron_cpu import Shape, build, load_strictly

LAYERS, RANK = 4, 4
FUSED = {
    "self_attention.linear_qkv": (128, 64), "self_attention.linear_proj": (64, 64),
    "mlp.linear_fc1": (192, 64), "mlp.linear_fc2": (64, 96),
}  # fmt: skip


def plain_tensors(iteration):
    from megatron.core import dist_checkpointing

    tensors = dist_checkpointing.load_plain_tensors(iteration)
    return {name: value for name, value in tensors.items() if isinstance(value, torch.Tensor)}


def read_everything(_rank, iteration):
    from megatron.core import dist_checkpointing, parallel_state

    parallel_state.initialize_model_parallel()
    tensors = plain_tensors(iteration)
    return {name: tensor.numpy() for name, tensor in tensors.items()}, dist_checkpointing.load_content_metadata(iteration)


def adapted_logits(_rank, shape, base, adapter, scale):
    """Of megatron-core's own model after W + scale · B · A on its fused weights, rows brought to a magnitude if there is one."""
    [model] = build(shape)
    load_strictly([model], base)
    tensors = plain_tensors(adapter)
    modules = {name.partition(".adapter.")[0] for name in tensors}
    for module in modules:
        weight = model.get_submodule(module).weight.data
        a, b = (tensors[f"{module}.adapter.linear_{way}.weight"] for way in ("in", "out"))
        weight += scale * (b @ a)
        magnitude = tensors.get(f"{module}.adapter.weight_magnitude")
        if magnitude is not None:
            weight *= (magnitude / weight.norm(dim=1))[:, None]
    data = torch.tensor(TOKENS)
    positions = torch.arange(data.shape[1]).unsqueeze(0).expand_as(data)
    mask = torch.triu(torch.ones(1, 1, data.shape[1], data.shape[1], dtype=torch.bool), 1)
    with torch.no_grad():
        return model(data, positions, mask).numpy()


@pytest.mark.parametrize("kind", [{}, {"use_dora": True}, {"use_rslora": True, "r": 6}])
def test_a_fused_adapter_on_fused_weights_computes_what_peft_computes(ranks, peft_folder, base, tmp_path, kind):
    folder = peft_folder(equal_a=True, **kind)
    hf_to_mcore(base, tmp_path / "base")
    adapter_to_mcore(folder, tmp_path / "m", base=base, canonical=False)
    adapter_to_hf(tmp_path / "m", tmp_path / "back")
    scale = 8 / 6**0.5 if "r" in kind else 2.0
    shape = Shape(json.loads((base / "config.json").read_text()))
    iterations = (str(tmp_path / name / "iter_0000000") for name in ("base", "m"))
    [actual] = ranks.run(adapted_logits, 1, shape, *iterations, scale)
    expected = logits(with_adapter(base, tmp_path / "back")).numpy()
    assert np.ptp(expected) > 4, "a test of small logits proves little"
    np.testing.assert_allclose(actual[..., : expected.shape[-1]], expected, atol=2e-4, rtol=0)


def test_megatron_core_lists_one_tensor_per_layer_and_reads_it(ranks, peft_folder, base, tmp_path):
    adapter_to_mcore(peft_folder(equal_a=True, use_dora=True), tmp_path / "m", base=base, canonical=False)
    [(tensors, content)] = ranks.run(read_everything, 1, str(tmp_path / "m" / "iter_0000000"))
    assert content["non_homogeneous_layers"] is True
    expected = {}
    for layer in range(LAYERS):
        for module, (rows, columns) in FUSED.items():
            prefix = f"decoder.layers.{layer}.{module}.adapter"
            expected |= {f"{prefix}.linear_in.weight": (RANK, columns), f"{prefix}.linear_out.weight": (rows, RANK)}
            expected |= {f"{prefix}.weight_magnitude": (rows,)}
    assert {name: tensor.shape for name, tensor in tensors.items()} == expected


def test_canonical_names(ranks, peft_folder, base, tmp_path):
    folder = peft_folder(target_modules=["k_proj", "up_proj", "o_proj"], use_dora=True)
    adapter_to_mcore(folder, tmp_path / "m", base=base)
    [(tensors, _)] = ranks.run(read_everything, 1, str(tmp_path / "m" / "iter_0000000"))
    first = {name.removeprefix("decoder.layers.0."): tensor.shape for name, tensor in tensors.items() if "layers.0." in name}
    assert first == {
        "self_attention.linear_qkv.adapter.adapter_k.linear_in.weight": (4, 64),
        "self_attention.linear_qkv.adapter.adapter_k.linear_out.weight": (32, 4),
        "self_attention.linear_qkv.adapter.adapter_k.weight_magnitude": (32,),
        "mlp.linear_fc1.adapter.adapter_up.linear_in.weight": (4, 64),
        "mlp.linear_fc1.adapter.adapter_up.linear_out.weight": (96, 4),
        "mlp.linear_fc1.adapter.adapter_up.weight_magnitude": (96,),
        "self_attention.linear_proj.adapter.linear_in.weight": (4, 64),
        "self_attention.linear_proj.adapter.linear_out.weight": (64, 4),
        "self_attention.linear_proj.adapter.weight_magnitude": (64,),
    }


def save_stacked(rank, iteration, target):
    """What was written one tensor per layer, saved by megatron-core on two tensor-parallel ranks as stacked layers."""
    from pathlib import Path

    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    parallel_state.initialize_model_parallel(2)
    layers = {}
    for name, tensor in plain_tensors(iteration).items():
        head, _, rest = name.partition("layers.")
        number, _, module = rest.partition(".")
        layers.setdefault(f"{head}layers.{module}", {})[int(number)] = tensor
    state = {}
    for key, by_layer in layers.items():
        cut = 1 if key.endswith(("linear_proj.adapter.linear_in.weight", "linear_fc2.adapter.linear_in.weight")) else 0
        for number, tensor in by_layer.items():
            part = tensor.chunk(2, dim=cut)[rank].contiguous()
            offsets = (0, number, len(by_layer)), (1 + cut, rank, 2)
            state[f"{key}.{number}"] = ShardedTensor.from_rank_offsets(key, part, *offsets, prepend_axis_num=1)
    if rank == 0:
        Path(target).mkdir()
    torch.distributed.barrier()
    dist_checkpointing.save(state, target)


@pytest.mark.parametrize("canonical", [True, False])
def test_stacked_layers_from_several_ranks_read_the_same(ranks, peft_folder, base, tmp_path, canonical):
    folder = peft_folder(equal_a=True, use_dora=True)
    adapter_to_mcore(folder, tmp_path / "m", base=base, canonical=canonical)
    ours, theirs = tmp_path / "m" / "iter_0000000", tmp_path / "iter_0000009"
    ranks.run(save_stacked, 2, str(ours), str(theirs))
    for name in ("adapter.json", "huggingface/files/config.json"):
        (theirs / name).parent.mkdir(parents=True, exist_ok=True)
        (theirs / name).write_bytes((ours / name).read_bytes())
    adapter_to_hf(theirs, tmp_path / "back", verify=True)
    file = "adapter_model.safetensors"
    assert (tmp_path / "back" / file).read_bytes() == (folder / file).read_bytes()
