"""With Transformer Engine on a GPU: the strict load asks for nothing we did not write, and the logits are transformers'."""

from __future__ import annotations

import argparse
import json
import os

import numpy as np
import pytest

from converter import hf_to_mcore
from formats.detect import open_megatron
from formats.folder import LocalFolder
from tests import models
from tests.megatron_fsdp import load_strictly

pytestmark = pytest.mark.gpu

SHAPE = {
    "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 32000,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_gpu():
    import torch
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    # Transformer Engine multiplies fp32 in TF32, with 10 bits of mantissa, unless it is told not to.
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29611", RANK="0", WORLD_SIZE="1", NVIDIA_TF32_OVERRIDE="0")
    torch.distributed.init_process_group("nccl")
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def te_model(config, dtype, *, biased=False):
    """GPTModel with Transformer Engine's layers, for a Llama `config.json`."""
    import torch
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
    from megatron.core.transformer import TransformerConfig

    transformer = TransformerConfig(
        num_layers=config["num_hidden_layers"], hidden_size=config["hidden_size"], ffn_hidden_size=config["intermediate_size"],
        num_attention_heads=config["num_attention_heads"], num_query_groups=config["num_key_value_heads"],
        kv_channels=config["head_dim"], normalization="RMSNorm", layernorm_epsilon=config["rms_norm_eps"],
        gated_linear_unit=True, activation_func=torch.nn.functional.silu, add_bias_linear=biased, hidden_dropout=0.0,
        attention_dropout=0.0, params_dtype=dtype, bf16=dtype == torch.bfloat16, gradient_accumulation_fusion=False,
    )  # fmt: skip
    rope = config["rope_parameters"]
    model = GPTModel(
        transformer, get_gpt_layer_with_transformer_engine_spec(), vocab_size=config["vocab_size"], max_sequence_length=256,
        position_embedding_type="rope", rotary_base=rope["rope_theta"], rope_scaling=rope["rope_type"] == "llama3",
        rope_scaling_factor=rope.get("factor", 8.0), share_embeddings_and_output_weights=config["tie_word_embeddings"],
    )  # fmt: skip
    return model.cuda().to(dtype).eval()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", ["gqa", "tied", "rope31", "attention_bias"])
def test_transformer_engine_loads_strictly_and_computes_transformers_logits(tmp_path, variant, dtype):
    import torch
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling
    from transformers import AutoModelForCausalLM

    from trainer import tensor_properties

    folder = models.save(models.build(variant, dtype=dtype, **SHAPE), tmp_path / "hf", side_files=False)
    hf_to_mcore(folder, tmp_path / "m", tp=2, pp=2, make_vocab_size_divisible_by=32)
    config = json.loads((folder / "config.json").read_text())
    model = te_model(config, getattr(torch, dtype), biased=variant == "attention_bias")
    iteration = str(tmp_path / "m" / "iter_0000000")
    asked = {"model": model.sharded_state_dict()}
    with tensor_properties.without_strides():
        model.load_state_dict(dist_checkpointing.load(asked, iteration, strict=StrictHandling.RAISE_ALL)["model"])

    torch.manual_seed(3)
    tokens = torch.randint(0, config["vocab_size"], (2, 128), device="cuda")
    positions = torch.arange(128, device="cuda")[None].expand_as(tokens)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).cuda().eval()
    with torch.no_grad():
        actual = model(tokens, positions, None)[..., : config["vocab_size"]].float()
        expected = reference(tokens).logits.float()
    spread = (expected.max() - expected.min()).item()
    worst = (actual - expected).abs().max().item()
    print(f"{variant} {dtype}: logits span {spread:.2f}, largest difference {worst:.2e}")
    assert spread > 4
    # fp32 sums in another order; bf16 rounds activations to 8 bits at every layer.
    assert worst < {"float32": 2e-4, "bfloat16": 0.05 * spread}[dtype]


def weights_of(root):
    """The weights of a checkpoint, by name."""
    reader, weights = open_megatron(LocalFolder(root)), {}
    for name, spec in reader.specs.items():
        weights[name] = np.empty(spec.shape, spec.dtype)
        reader.read(name, spec.full_region, weights[name])
    return weights


@pytest.mark.parametrize("variant", ["gqa", "tied", "attention_bias"])
def test_transformer_engine_loads_files_of_ranks_strictly(tmp_path, variant):
    import torch

    folder = models.save(models.build(variant, dtype="bfloat16", **SHAPE), tmp_path / "hf", side_files=False)
    hf_to_mcore(folder, tmp_path / "m", ckpt_format="torch", make_vocab_size_divisible_by=32)
    config = json.loads((folder / "config.json").read_text())
    model = te_model(config, torch.bfloat16, biased=variant == "attention_bias")
    with torch.serialization.safe_globals([argparse.Namespace]):
        state = torch.load(tmp_path / "m" / "release" / "mp_rank_00" / "model_optim_rng.pt", map_location="cpu")["model"]
    model.load_state_dict(state, strict=True)
    written = weights_of(tmp_path / "m")
    held = {name: value.detach().float().cpu().numpy() for name, value in model.named_parameters()}
    assert held.keys() == written.keys()
    for name, value in held.items():
        np.testing.assert_array_equal(value, written[name].astype(np.float32))


def test_megatron_fsdp_loads_its_format_strictly(tmp_path):
    import torch

    folder = models.save(models.build("gqa", dtype="bfloat16", **SHAPE), tmp_path / "hf", side_files=False)
    hf_to_mcore(folder, tmp_path / "m", ckpt_format="fsdp_dtensor", make_vocab_size_divisible_by=32)
    model = te_model(json.loads((folder / "config.json").read_text()), torch.bfloat16)
    held, written = load_strictly(model, str(tmp_path / "m")), weights_of(tmp_path / "m")
    assert held.keys() == written.keys()
    for name, (_, value) in held.items():
        np.testing.assert_array_equal(value, written[name])
