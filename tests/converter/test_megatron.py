"""megatron-core loads what we write, strictly, at other layouts, and computes what transformers computes."""

from __future__ import annotations

import json

import numpy as np
import pytest

from converter import hf_to_mcore
from tests.megatron_cpu import Shape, logits_of
from tests.models import VARIANTS

TOKENS = np.random.default_rng(5).integers(0, 384, (2, 24)).tolist()
LAYOUTS = {"tp1": (1, 1), "tp2": (2, 1), "tp4": (4, 1), "pp2": (1, 2), "pp4": (1, 4), "tp2pp2": (2, 2)}
WRITTEN = {"gqa": (2, 2), "mha": (4, 2), "mqa": (4, 1), "tp_above_groups": (4, 1), "tied": (1, 4)}
"""The layout a variant is converted to, where not TP1·PP2: never the one it is loaded at, for some layout."""


def expected_logits(folder):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


def check(ranks, shape, converted, folder):
    """Every rank's strict load leaves only `_extra_state`; the last stage's logits equal transformers'."""
    answers = ranks.run(logits_of, shape.tp * shape.pp, shape, str(converted / "iter_0000000"), TOKENS)
    assert all("_extra_state" in key for left, _ in answers for key in left)
    expected = expected_logits(folder)
    assert np.ptp(expected) > 4, "a test of small logits proves little"
    outputs = [logits for _, logits in answers if logits is not None]
    assert outputs
    for logits in outputs:
        np.testing.assert_allclose(logits[..., : expected.shape[-1]], expected, atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def converted(tmp_path_factory, model_folder):
    """A variant converted once, with its config."""
    made = {}

    def convert(variant, family="llama", **changes):
        if (variant, family) not in made:
            folder = model_folder(variant, family=family, **changes)
            tp, pp = WRITTEN.get(variant, (1, 2))
            target = tmp_path_factory.mktemp("megatron") / variant
            hf_to_mcore(folder, target, tp=tp, pp=pp)
            made[variant, family] = folder, target, json.loads((folder / "config.json").read_text())
        return made[variant, family]

    return convert


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers_after_a_strict_load(ranks, converted, variant, layout):
    folder, target, config = converted(variant)
    tp, pp = LAYOUTS[layout]
    check(ranks, Shape(config, tp, pp), target, folder)


@pytest.mark.parametrize("layout", ["tp1", "tp2pp2"])
def test_mistral_with_a_window_shorter_than_the_text_equals_transformers(ranks, converted, layout):
    folder, target, config = converted("window", family="mistral", sliding_window=7)
    tp, pp = LAYOUTS[layout]
    check(ranks, Shape(config, tp, pp), target, folder)


UNEVEN = {1: None, 2: "Et*3|t*2L", 4: "Et*2|t|t|tL"}
"""Five layers in megatron-core's words, by pipeline size."""


@pytest.mark.parametrize("layout", LAYOUTS)
def test_uneven_stages_load_at_every_layout(ranks, model_folder, tmp_path, layout):
    folder, (tp, pp) = model_folder("gqa", num_hidden_layers=5), LAYOUTS[layout]
    config = json.loads((folder / "config.json").read_text())
    hf_to_mcore(folder, tmp_path / "m", tp=2, pp=2, pp_layout=[3, 2])
    check(ranks, Shape(config, tp, pp, layout=UNEVEN[pp]), tmp_path / "m", folder)


@pytest.mark.parametrize("shape", [*LAYOUTS.values(), (2, 2, 2), (1, 2, 2)], ids=str)
def test_virtual_stages_load_at_every_layout(ranks, model_folder, tmp_path, shape):
    folder = model_folder("padded_vocab")
    config = json.loads((folder / "config.json").read_text())
    hf_to_mcore(folder, tmp_path / "m", tp=2, pp=2, vpp=2)
    check(ranks, Shape(config, *shape), tmp_path / "m", folder)


def test_virtual_stages_of_uneven_sizes_load(ranks, model_folder, tmp_path):
    folder = model_folder("gqa", num_hidden_layers=6)
    config = json.loads((folder / "config.json").read_text())
    hf_to_mcore(folder, tmp_path / "m", tp=1, pp=2, vpp=2, pp_layout=[2, 1, 2, 1])
    check(ranks, Shape(config, 1, 2, vpp=2, layout="Et*2|t|t*2|tL"), tmp_path / "m", folder)
