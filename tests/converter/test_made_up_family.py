"""Verbs that no small model of transformers needs, by a family that only tests have, `vocabulary/made_up.py`: prediction layers,
halves, axes of one, other roots, a copy of the embedding."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from converter import UserError, hf_to_mcore, mcore_to_hf
from tests.converter.published_layouts import SMALL, attention, mlp, outside
from tests.converter.weights import stored
from tests.models import model_tree

pytestmark = pytest.mark.usefixtures("families_of_tests")


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
    expected, actual = made_up_oracle(tensors, *names), stored(tmp_path / "m")
    assert actual.keys() == expected.keys()
    for name, array in actual.items():
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
