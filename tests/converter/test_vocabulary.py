"""Every verb of the vocabulary, by families that only tests have: what is written is what the published layouts say, worked out
here with plain slices, and the way back gives the same bytes, at several layouts."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from converter import UserError, hf_to_mcore, mcore_to_hf, verify
from formats.folder import LocalFolder
from formats.torch_dist import TorchDistReader
from tests.converter.conftest import families_from
from tests.models import model_tree

FOLDER = Path(__file__).parent / "vocabulary"

SMALL = {
    "num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 96, "max_position_embeddings": 64, "head_dim": 8,
}  # fmt: skip
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
MODELS = {
    "qwen2": SMALL,
    "phi3": {**SMALL, "pad_token_id": 0},
    "olmo": {**{key: value for key, value in SMALL.items() if key != "head_dim"}, "pad_token_id": 0},
    "mixtral": {**SMALL, **EXPERTS},
    "gpt_oss": {**SMALL, **EXPERTS},
    "dbrx": {
        "n_layers": 3, "d_model": 32, "n_heads": 4, "max_seq_len": 64, "vocab_size": 96,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 1e6, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    },
    "mamba2": {
        "num_hidden_layers": 3, "hidden_size": 32, "vocab_size": 96, "head_dim": 8, "num_heads": 8, "expand": 2, "n_groups": 2,
        "state_size": 4, "pad_token_id": 0, "tie_word_embeddings": False,
    },
    "qwen3_next": {
        **SMALL, "num_hidden_layers": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40, "partial_rotary_factor": 1.0,
        "linear_key_head_dim": 4, "linear_value_head_dim": 6, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "layer_types": [*["linear_attention"] * 2, "full_attention", "linear_attention"],
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def _more_families(monkeypatch):
    with families_from(FOLDER, monkeypatch):
        yield


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A model directory of a family, as transformers saves it, with random weights that bf16 holds."""
    known = {}

    def make(family, dtype="bfloat16"):
        if (family, dtype) not in known:
            known[family, dtype] = _save(family, getattr(torch, dtype), tmp_path_factory.mktemp(family) / "hf")
        return known[family, dtype]

    return make


def _save(family, dtype, folder):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **MODELS[family]), dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randint(-127, 128, parameter.shape) / 64)  # exact in bf16, also with 1 taken off
    model.save_pretrained(folder, max_shard_size="60KB")
    return folder


def stored(out):
    """Every weight of a checkpoint, under Megatron's names with a number for each layer and expert."""
    reader = TorchDistReader(LocalFolder(out))
    reader.check()
    found = {}
    for name, spec in reader.specs.items():
        found[name] = np.empty(spec.shape, spec.dtype)
        reader.read(name, spec.full_region, found[name])
    reader.close()
    return found


def as_torch(array):
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16) if array.dtype.itemsize == 2 else torch.from_numpy(array)


def source(folder):
    """Every tensor of a model directory."""
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


# ---- what the published layouts say, each in plain slices


def fused_qkv(q, k, v, groups=2):
    """Group by group: its queries, its key, its value."""
    parts = [part.reshape(groups, -1, *part.shape[1:]) for part in (q, k, v)]
    return torch.cat(parts, 1).reshape(-1, *q.shape[1:])


def attention(t, megatron, huggingface, out, *, bias=False):
    q, k, v = (t[f"{huggingface}self_attn.{name}_proj.weight"] for name in "qkv")
    out[f"{megatron}self_attention.linear_qkv.weight"] = fused_qkv(q, k, v)
    out[f"{megatron}self_attention.linear_qkv.layer_norm_weight"] = t[f"{huggingface}input_layernorm.weight"]
    out[f"{megatron}self_attention.linear_proj.weight"] = t[f"{huggingface}self_attn.o_proj.weight"]
    if bias:
        q, k, v = (t[f"{huggingface}self_attn.{name}_proj.bias"] for name in "qkv")
        out[f"{megatron}self_attention.linear_qkv.bias"] = fused_qkv(q, k, v)


def mlp(t, megatron, huggingface, out):
    out[f"{megatron}mlp.linear_fc1.layer_norm_weight"] = t[f"{huggingface}post_attention_layernorm.weight"]
    gate, up = (t[f"{huggingface}mlp.{name}_proj.weight"] for name in ("gate", "up"))
    out[f"{megatron}mlp.linear_fc1.weight"] = torch.cat([gate, up])
    out[f"{megatron}mlp.linear_fc2.weight"] = t[f"{huggingface}mlp.down_proj.weight"]


def outside(t, embedding="model.embed_tokens.weight", norm="model.norm.weight", megatron_norm="decoder.final_layernorm.weight"):
    def padded(weight):
        return torch.cat([weight, torch.zeros(-len(weight) % 128, weight.shape[1], dtype=weight.dtype)])

    out = {"embedding.word_embeddings.weight": padded(t[embedding])}
    if norm:
        out[megatron_norm] = t[norm]
    if "lm_head.weight" in t:
        out["output_layer.weight"] = padded(t["lm_head.weight"])
    return out


def layers(t, prefix="model.layers"):
    count = 1 + max(int(name.split(f"{prefix}.")[1].split(".")[0]) for name in t if f"{prefix}." in name)
    return [(f"decoder.layers.{n}.", f"{prefix}.{n}.") for n in range(count)]


def qwen2(t):
    out = outside(t)
    for m, h in layers(t):
        attention(t, m, h, out, bias=True)
        mlp(t, m, h, out)
    return out


def phi3(t):
    out = outside(t)
    for m, h in layers(t):
        q, k, v = t[f"{h}self_attn.qkv_proj.weight"].split([32, 16, 16])
        out[f"{m}self_attention.linear_qkv.weight"] = fused_qkv(q, k, v)
        out[f"{m}self_attention.linear_qkv.layer_norm_weight"] = t[f"{h}input_layernorm.weight"]
        out[f"{m}self_attention.linear_proj.weight"] = t[f"{h}self_attn.o_proj.weight"]
        out[f"{m}mlp.linear_fc1.layer_norm_weight"] = t[f"{h}post_attention_layernorm.weight"]
        out[f"{m}mlp.linear_fc1.weight"] = t[f"{h}mlp.gate_up_proj.weight"]
        out[f"{m}mlp.linear_fc2.weight"] = t[f"{h}mlp.down_proj.weight"]
    return out


def olmo(t):
    ones, zeros = torch.ones(32, dtype=torch.bfloat16), torch.zeros(32, dtype=torch.bfloat16)
    out = {**outside(t, norm=""), "decoder.final_layernorm.weight": ones, "decoder.final_layernorm.bias": zeros}
    for m, h in layers(t):
        known = {**t, f"{h}input_layernorm.weight": ones, f"{h}post_attention_layernorm.weight": ones}
        attention(known, m, h, out)
        mlp(known, m, h, out)
        for module in ("self_attention.linear_qkv", "mlp.linear_fc1"):
            out[f"{m}{module}.layer_norm_bias"] = zeros
    return out


def mixtral(t):
    out = outside(t)
    for m, h in layers(t):
        attention(t, m, h, out)
        out[f"{m}pre_mlp_layernorm.weight"] = t[f"{h}post_attention_layernorm.weight"]
        out[f"{m}mlp.router.weight"] = t[f"{h}block_sparse_moe.gate.weight"]
        for e in range(4):
            w1, w2, w3 = (t[f"{h}block_sparse_moe.experts.{e}.w{n}.weight"] for n in (1, 2, 3))
            out[f"{m}mlp.experts.{e}.linear_fc1.weight"] = torch.cat([w1, w3])
            out[f"{m}mlp.experts.{e}.linear_fc2.weight"] = w2
    return out


def gpt_oss(t):
    out = outside(t)
    for m, h in layers(t):
        attention(t, m, h, out, bias=True)
        out[f"{m}self_attention.linear_proj.bias"] = t[f"{h}self_attn.o_proj.bias"]
        out[f"{m}self_attention.core_attention.softmax_offset"] = t[f"{h}self_attn.sinks"]
        out[f"{m}pre_mlp_layernorm.weight"] = t[f"{h}post_attention_layernorm.weight"]
        for name in ("weight", "bias"):
            out[f"{m}mlp.router.{name}"] = t[f"{h}mlp.router.{name}"]
        for e in range(4):
            fc1 = t[f"{h}mlp.experts.gate_up_proj"][e].T
            bias = t[f"{h}mlp.experts.gate_up_proj_bias"][e]
            out[f"{m}mlp.experts.{e}.linear_fc1.weight"] = torch.cat([fc1[::2], fc1[1::2]])
            out[f"{m}mlp.experts.{e}.linear_fc1.bias"] = torch.cat([bias[::2], bias[1::2]])
            out[f"{m}mlp.experts.{e}.linear_fc2.weight"] = t[f"{h}mlp.experts.down_proj"][e].T
            out[f"{m}mlp.experts.{e}.linear_fc2.bias"] = t[f"{h}mlp.experts.down_proj_bias"][e]
    return out


def dbrx(t):
    zeros = torch.zeros(32, dtype=torch.bfloat16)
    out = {**outside(t, "transformer.wte.weight", "transformer.norm_f.weight"), "decoder.final_layernorm.bias": zeros}
    for m, h in layers(t, "transformer.blocks"):
        q, k, v = t[f"{h}norm_attn_norm.attn.Wqkv.weight"].split([32, 16, 16])
        out[f"{m}self_attention.linear_qkv.weight"] = fused_qkv(q, k, v)
        out[f"{m}self_attention.linear_qkv.layer_norm_weight"] = t[f"{h}norm_attn_norm.norm_1.weight"]
        out[f"{m}self_attention.linear_qkv.layer_norm_bias"] = out[f"{m}pre_mlp_layernorm.bias"] = zeros
        out[f"{m}self_attention.linear_proj.weight"] = t[f"{h}norm_attn_norm.attn.out_proj.weight"]
        out[f"{m}pre_mlp_layernorm.weight"] = t[f"{h}norm_attn_norm.norm_2.weight"]
        out[f"{m}mlp.router.weight"] = t[f"{h}ffn.router.layer.weight"]
        w1, v1, w2 = (t[f"{h}ffn.experts.mlp.{name}"].reshape(4, 48, 32) for name in ("w1", "v1", "w2"))
        for e in range(4):
            out[f"{m}mlp.experts.{e}.linear_fc1.weight"] = torch.cat([w1[e], v1[e]])
            out[f"{m}mlp.experts.{e}.linear_fc2.weight"] = w2[e].T
    return out


def mamba2(t):
    out = outside(t, "backbone.embeddings.weight", "backbone.norm_f.weight", "decoder.final_norm.weight")
    for layer, h in layers(t, "backbone.layers"):
        m, g = f"{layer}mixer.", f"{h}mixer."
        out[f"{m}in_proj.layer_norm_weight"] = t[f"{h}norm.weight"]
        for name in ("A_log", "D"):
            out[f"{m}{name}"] = t[f"{g}{name}"].float()
        out[f"{m}dt_bias"] = t[f"{g}dt_bias"]
        sizes = {"z": 64, "x": 64, "B": 8, "C": 8, "dt": 8}
        for name, part in zip(sizes, t[f"{g}in_proj.weight"].split([*sizes.values()]), strict=True):
            out[f"{m}in_proj.weight.{name}"] = part
        for kind in ("weight", "bias"):
            for name, part in zip("xBC", t[f"{g}conv1d.{kind}"].split([64, 8, 8]), strict=True):
                out[f"{m}conv1d.{kind}.{name}"] = part
        out[f"{m}norm.weight"] = t[f"{g}norm.weight"]
        out[f"{m}out_proj.weight"] = t[f"{g}out_proj.weight"]
    return out


def full_attention(t, m, h, out):
    """[groups, heads, 2, head_dim, hidden]: query and gate head by head."""
    q, gate = t[f"{h}self_attn.q_proj.weight"].reshape(2, 2, 2, 8, 32).unbind(2)
    k, v = (t[f"{h}self_attn.{name}_proj.weight"].reshape(2, 8, 32) for name in "kv")
    rows = [torch.cat([q[g].reshape(16, 32), gate[g].reshape(16, 32), k[g], v[g]]) for g in range(2)]
    out[f"{m}self_attention.linear_qkv.weight"] = torch.cat(rows)
    out[f"{m}self_attention.linear_qkv.layer_norm_weight"] = t[f"{h}input_layernorm.weight"]
    out[f"{m}self_attention.linear_proj.weight"] = t[f"{h}self_attn.o_proj.weight"]
    for name in "qk":
        out[f"{m}self_attention.{name}_layernorm.weight"] = t[f"{h}self_attn.{name}_norm.weight"]


def linear_attention(t, m, h, out):
    a, g = f"{m}self_attention.", f"{h}linear_attn."
    out[f"{a}in_proj.layer_norm_weight"] = t[f"{h}input_layernorm.weight"]
    qkvz = t[f"{g}in_proj_qkvz.weight"].reshape(2, 4 + 4 + 12 + 12, 32)
    for name, part in zip(("query", "key", "value", "z"), qkvz.split([4, 4, 12, 12], 1), strict=True):
        out[f"{a}in_proj.weight.{name}"] = part.reshape(-1, 32)
    for name, part in zip(("beta", "alpha"), t[f"{g}in_proj_ba.weight"].reshape(2, 4, 32).split(2, 1), strict=True):
        out[f"{a}in_proj.weight.{name}"] = part.reshape(-1, 32)
    for name, part in zip(("query", "key", "value"), t[f"{g}conv1d.weight"].split([8, 8, 24]), strict=True):
        out[f"{a}conv1d.weight.{name}"] = part
    for name in ("A_log", "dt_bias", "out_proj.weight"):
        out[f"{a}{name}"] = t[f"{g}{name}"]
    out[f"{a}out_norm.weight"] = t[f"{g}norm.weight"] - 1


def qwen3_next(t):
    out = outside(t)
    for number, (m, h) in enumerate(layers(t)):
        (full_attention if number == 2 else linear_attention)(t, m, h, out)
        out[f"{m}pre_mlp_layernorm.weight"] = t[f"{h}post_attention_layernorm.weight"]
        out[f"{m}mlp.router.weight"] = t[f"{h}mlp.gate.weight"]
        for e in range(4):
            gate, up = (t[f"{h}mlp.experts.{e}.{name}_proj.weight"] for name in ("gate", "up"))
            out[f"{m}mlp.experts.{e}.linear_fc1.weight"] = torch.cat([gate, up])
            out[f"{m}mlp.experts.{e}.linear_fc2.weight"] = t[f"{h}mlp.experts.{e}.down_proj.weight"]
        gate, up = (t[f"{h}mlp.shared_expert.{name}_proj.weight"] for name in ("gate", "up"))
        out[f"{m}mlp.shared_experts.linear_fc1.weight"] = torch.cat([gate, up])
        out[f"{m}mlp.shared_experts.linear_fc2.weight"] = t[f"{h}mlp.shared_expert.down_proj.weight"]
        out[f"{m}mlp.shared_experts.gate_weight"] = t[f"{h}mlp.shared_expert_gate.weight"]
    return out


ORACLES = {one.__name__: one for one in (qwen2, phi3, olmo, mixtral, gpt_oss, dbrx, mamba2, qwen3_next)}
LAYOUTS = {"tp 1": {}, "tp 2": {"tp": 2}, "pp 3": {"pp": 3}}
WITH_EXPERTS = {"ep 2": {"tp": 2, "ep": 2, "etp": 1}, "ep 4, etp 2": {"tp": 1, "ep": 4, "etp": 2}}
CASES = [
    (family, name, layout) for family in ORACLES for name, layout in LAYOUTS.items() if family != "qwen3_next" or name != "pp 3"
]
CASES += [
    (family, name, layout) for family in ("mixtral", "gpt_oss", "dbrx", "qwen3_next") for name, layout in WITH_EXPERTS.items()
]


@pytest.mark.parametrize(("family", "layout"), [pytest.param(f, layout, id=f"{f}, {name}") for f, name, layout in CASES])
def test_weights_are_where_the_published_layout_has_them_and_come_back_to_the_bit(made, tmp_path, family, layout):
    folder = made(family)
    hf_to_mcore(folder, tmp_path / "m", verify=True, make_vocab_size_divisible_by=128 // layout.get("tp", 1), **layout)
    expected = ORACLES[family](source(folder))
    found = stored(tmp_path / "m")
    assert found.keys() == expected.keys()
    for name, array in found.items():
        tensor = as_torch(array)
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name
    mcore_to_hf(tmp_path / "m", tmp_path / "back", verify=True)
    assert model_tree(tmp_path / "back") == model_tree(folder)
    assert verify(folder, tmp_path / "m").same


@pytest.mark.parametrize("family", ["gpt_oss", "mamba2", "phi3", "qwen3_next"])
def test_hashes_of_tensors_that_do_not_pass_in_order_are_those_of_their_bytes(made, tmp_path, family):
    from blake3 import blake3

    hf_to_mcore(made(family), tmp_path / "m", workers=3)
    listed = json.loads((tmp_path / "m" / "iter_0000000" / "conversion.json").read_text())["blake3"]
    tensors = source(made(family))
    tensors |= {name: tensors[name.removesuffix(".as_stored")] for name in listed.keys() - tensors.keys()}
    assert listed == {name: blake3(t.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest() for name, t in tensors.items()}


@pytest.mark.parametrize("family", ["gpt_oss", "dbrx", "qwen3_next"])
def test_the_size_of_pieces_and_the_number_of_threads_do_not_change_a_byte(made, tmp_path, monkeypatch, family):
    import converter.run
    import converter.worker

    hf_to_mcore(made(family), tmp_path / "one", workers=1)
    for module in (converter.run, converter.worker):
        monkeypatch.setattr(module, "PIECE_BYTES", 1000)
    hf_to_mcore(made(family), tmp_path / "two", workers=4)
    data = [{p.name: p.read_bytes() for p in sorted((tmp_path / one).rglob("*.distcp"))} for one in ("one", "two")]
    assert data[0] == data[1]
    mcore_to_hf(tmp_path / "two", tmp_path / "back", workers=4)
    assert model_tree(tmp_path / "back") == model_tree(made(family))


def test_a_dtype_that_a_family_keeps_wins_over_the_one_asked_for_and_the_source_s_comes_back(made, tmp_path):
    folder = made("mamba2")
    hf_to_mcore(folder, tmp_path / "m", dtype="fp16")
    found = {name: array.dtype.name for name, array in stored(tmp_path / "m").items()}
    assert {found[f"decoder.layers.{n}.mixer.{one}"] for n in range(3) for one in ("A_log", "D")} == {"float32"}
    assert {dtype for name, dtype in found.items() if not name.endswith(("A_log", "D"))} == {"float16"}
    mcore_to_hf(tmp_path / "m", tmp_path / "back")
    back = source(tmp_path / "back")
    assert {str(t.dtype) for name, t in back.items() if not name.endswith(("A_log", "D"))} == {"torch.float16"}
    assert {str(t.dtype) for name, t in back.items() if name.endswith(("A_log", "D"))} == {"torch.bfloat16"}


@pytest.mark.parametrize(("family", "name"), [("olmo", "decoder.layers.1.mlp.linear_fc1.layer_norm_weight")])
def test_a_weight_that_hugging_face_has_not_must_still_be_what_it_was(made, tmp_path, family, name):
    hf_to_mcore(made(family), tmp_path / "m", integrity=False)
    reader = TorchDistReader(LocalFolder(tmp_path / "m"))
    location = reader.chunks(name)[0].location
    path = tmp_path / "m" / "iter_0000000" / location.file
    data = bytearray(path.read_bytes())
    at = data.index(
        np.ones(32, np.float32).astype("<f4").view("<u4").astype("<u4").__rshift__(16).astype("<u2").tobytes(), location.offset
    )
    data[at : at + 2] = b"\x00\x40"
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"`{name}` is not 1 everywhere any more"):
        mcore_to_hf(tmp_path / "m", tmp_path / "back")
    assert not verify(made(family), tmp_path / "m").same


# ---- what no small model of transformers has


def new(*shape):
    return (torch.randint(-127, 128, shape) / 64).bfloat16()


def attention_tensors(h):
    sizes = {"q": 32, "k": 16, "v": 16, "o": 32}
    return {
        f"{h}input_layernorm.weight": new(32),
        **{f"{h}self_attn.{n}_proj.weight": new(rows, 32) for n, rows in sizes.items()},
    }


def moe_tensors(h):
    t = {f"{h}moe.bias": new(1, 4)}
    for e in range(4):
        t |= {f"{h}moe.{e}.gate_up.weight": new(48, 32), f"{h}moe.{e}.down.weight": new(32, 24)}
    return t


def made_up_tensors(root="model.", prefix="", *, copy=False, vision=False):
    """The tensors of a model of the family `made_up`: one dense layer, two with experts, two prediction layers."""
    torch.manual_seed(1)
    t = {f"{root}embed_tokens.weight": new(96, 32), f"{root}norm.weight": new(32), f"{prefix}lm_head.weight": new(96, 32)}
    for layer in range(3):
        h = f"{root}layers.{2 * layer + 1}."
        t |= {**attention_tensors(f"{root}layers.{2 * layer}."), **(moe_tensors(h) if layer else {})}
    dense = {f"mlp.{name}_proj.weight": new(*shape) for name, shape in (("gate", (48, 32)), ("up", (48, 32)), ("down", (32, 48)))}
    dense["post_attention_layernorm.weight"] = new(32)
    t |= {f"{root}layers.1.{name}": tensor for name, tensor in dense.items()}
    for n in (3, 4):
        h = f"{root}layers.{n}."
        t |= {f"{h}eh_proj.weight": new(32, 64), **attention_tensors(f"{h}block."), **moe_tensors(f"{h}block.")}
        t |= {f"{h}embed_tokens.weight": t[f"{root}embed_tokens.weight"].clone()} if copy else {}
    return {**t, **({"vision_tower.blocks.0.weight": new(3, 5), "vision_tower.norm": torch.rand(7)} if vision else {})}


def save_made_up(folder, tensors, **changes):
    config = {
        **SMALL, "model_type": "made_up", "architectures": ["MadeUpForCausalLM"], "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 24, "num_nextn_predict_layers": 2, "rms_norm_eps": 1e-6, **changes,
    }  # fmt: skip
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def made_up_oracle(t, root="model.", prefix=""):
    t = {name.removeprefix(prefix) if prefix else name: tensor for name, tensor in t.items() if not name.startswith("vision_")}
    t = {name.replace(root.removeprefix(prefix), "model.", 1): tensor for name, tensor in t.items()}
    out = outside(t)

    def moe(m, h):
        out[f"{m}mlp.router.expert_bias"] = t[f"{h}moe.bias"].squeeze(0).float()
        for e in range(4):
            out[f"{m}mlp.experts.{e}.linear_fc1.weight"] = t[f"{h}moe.{e}.gate_up.weight"]
            out[f"{m}mlp.experts.{e}.linear_fc2.weight"] = t[f"{h}moe.{e}.down.weight"]

    for layer in range(3):
        m = f"decoder.layers.{layer}."
        attention(t, m, f"model.layers.{2 * layer}.", out)
        if layer:
            moe(m, f"model.layers.{2 * layer + 1}.")
        else:
            mlp(t, m, "model.layers.1.", out)
    for n in range(2):
        m, h = f"mtp.layers.{n}.", f"model.layers.{3 + n}."
        out[f"{m}eh_proj.weight"] = t[f"{h}eh_proj.weight"]
        attention(t, f"{m}transformer_layer.", f"{h}block.", out)
        moe(f"{m}transformer_layer.", f"{h}block.")
    return out


ROOTS = {
    "first": ("model.", ""),
    "all prefixed": ("language_model.model.", "language_model."),
    "body": ("model.language_model.", ""),
}


@pytest.mark.parametrize("layout", [{}, {"tp": 2, "pp": 3}, {"ep": 2}], ids=str)
@pytest.mark.parametrize("root", ROOTS)
def test_prediction_layers_halves_axes_of_one_and_other_roots(tmp_path, root, layout):
    names = ROOTS[root]
    tensors = made_up_tensors(*names, copy=True, vision=True)
    folder = save_made_up(tmp_path / "hf", tensors)
    hf_to_mcore(folder, tmp_path / "m", verify=True, make_vocab_size_divisible_by=128 // layout.get("tp", 1), **layout)
    expected, found = made_up_oracle(tensors, *names), stored(tmp_path / "m")
    assert found.keys() == expected.keys()
    for name, array in found.items():
        assert np.array_equal(array.astype(np.float32), expected[name].float().numpy()), name
        assert array.dtype.name == str(expected[name].dtype).removeprefix("torch."), name
    mcore_to_hf(tmp_path / "m", tmp_path / "back", verify=True)
    assert model_tree(tmp_path / "back") == model_tree(folder)


def test_a_copy_of_the_embedding_that_differs_is_refused(tmp_path):
    tensors = made_up_tensors(copy=True)
    tensors["model.layers.4.embed_tokens.weight"][0, 0] += 1
    folder = save_made_up(tmp_path / "hf", tensors)
    assert hf_to_mcore(folder, tmp_path / "m", dry_run=True).dry_run  # which reads headers alone
    with pytest.raises(UserError, match=r"`model.layers.4.embed_tokens.weight` differs from `model.embed_tokens.weight`"):
        hf_to_mcore(folder, tmp_path / "m")


@pytest.mark.parametrize(("change", "message"), [
    ({"num_experts": 10**12}, "says 1000000000000 experts, more than the tensors there are could hold"),
    ({"num_nextn_predict_layers": 10**12}, "says 1000000000000 layers of multi-token prediction, more than"),
    ({"num_experts": 5}, r"the source lacks `model.layers.3.moe.4.gate_up.weight`"),
])  # fmt: skip
def test_numbers_of_a_damaged_config_are_not_counted_through(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        hf_to_mcore(save_made_up(tmp_path / "hf", made_up_tensors(), **change), tmp_path / "m")


def test_expert_parallel_sizes_that_do_not_fit_are_refused(made, tmp_path):
    refused = {3: "expert-parallel size 3 does not divide the model's 4 experts"}
    refused[1] = "expert-tensor-parallel size 5 does not divide the experts' feed-forward size, 48"
    for ep, message in refused.items():
        with pytest.raises(UserError, match=message):
            hf_to_mcore(made("mixtral"), tmp_path / "m", ep=ep, etp=5)
    with pytest.raises(UserError, match="expert-parallel size 2 needs a model with experts"):
        hf_to_mcore(made("qwen2"), tmp_path / "m", ep=2)


def test_a_rank_s_file_holds_its_experts(made, tmp_path):
    import pickle

    hf_to_mcore(made("mixtral"), tmp_path / "m", tp=2, ep=2, etp=1)
    metadata = pickle.loads((tmp_path / "m" / "iter_0000000" / ".metadata").read_bytes())
    key = "decoder.layers.mlp.experts.experts.linear_fc2.weight"
    held = {tuple(i.offset): info.relative_path for i, info in metadata.storage_data.items() if i.fqn == key}
    assert held == {(layer, e, 0, 0): f"__{e // 2}_0.distcp" for layer in range(3) for e in range(4)}


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_next"])
def test_a_conversion_that_was_stopped_goes_on_to_the_same_bytes(made, tmp_path, monkeypatch, family):
    import converter.run
    import converter.worker
    from formats.torch_dist_writer import TorchDistWriter

    for module in (converter.run, converter.worker):
        monkeypatch.setattr(module, "PIECE_BYTES", 1000)
    hf_to_mcore(made(family), tmp_path / "whole")
    write, calls = TorchDistWriter.write, itertools.count()

    def stopped(*arguments):
        if next(calls) > 150:
            raise KeyboardInterrupt
        write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(TorchDistWriter, "write", stopped)
        with pytest.raises(KeyboardInterrupt):
            hf_to_mcore(made(family), tmp_path / "again", workers=1)
    assert hf_to_mcore(made(family), tmp_path / "again", resume=True).reused_bytes > 0
    one, two = (model_tree(tmp_path / name / "iter_0000000") for name in ("whole", "again"))
    assert one == two
    hashes = [
        json.loads((tmp_path / name / "iter_0000000" / "conversion.json").read_text())["blake3"] for name in ("whole", "again")
    ]
    assert hashes[0] == hashes[1]


def test_what_a_run_left_that_knew_no_transforms_is_refused_by_name(made, tmp_path, monkeypatch):
    import converter.worker
    from formats.torch_dist_writer import TorchDistWriter

    calls, write = itertools.count(), TorchDistWriter.write

    def stopped(*arguments):
        if next(calls) > 20:
            raise KeyboardInterrupt
        write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(TorchDistWriter, "write", stopped)
        patch.setattr(converter.worker, "PLAN_FORMAT", None)
        with pytest.raises(KeyboardInterrupt):
            hf_to_mcore(made("qwen2"), tmp_path / "m", workers=1)
    with pytest.raises(UserError, match="was begun with a plan of format null, now it is 2"):
        hf_to_mcore(made("qwen2"), tmp_path / "m", resume=True)
