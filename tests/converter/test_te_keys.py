"""What is written of every family is what megatron-core asks for with Transformer Engine's layers, key for key:
`tests/golden/make_te_keys.py` builds the models, without a GPU."""

from __future__ import annotations

import gzip
import json

import pytest
import torch
from safetensors.torch import save_file

from converter import families, hf_to_mcore
from converter.config import make_model
from converter.planner import huggingface_tensors
from tests.conftest import GOLDEN
from tests.converter.test_golden import stored_keys
from tests.golden.make_te_keys import ON_GPU, taken_on_gpu

MADE = json.loads(gzip.decompress((GOLDEN / "te_keys.json.gz").read_bytes()))["models"]

ASKED = MADE | {f"{name}, on a GPU": taken_on_gpu(name) for name in ON_GPU}

NOT_BUILT = {name: family.WEIGHTS_ONLY for name in families.names() if not (family := families.find(name)).trains}
"""Families whose layers the trainer has not, and why."""


def save_zeros(config, folder):
    """A model directory of zeros, in bf16."""
    family = families.find(config["model_type"])
    model = make_model(family.CONFIG, config)
    shapes = dict(huggingface_tensors(family.RULES, model, dict.fromkeys(range(10_000))))
    folder.mkdir()
    save_file({name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_every_family_was_asked_for_or_there_is_a_reason():
    built = {case["config"]["model_type"] for case in MADE.values()}
    assert {*families.names()} - built - {*NOT_BUILT} == set(), "run tests/golden/make_te_keys.py"


@pytest.mark.parametrize("name", [name for name, asked in ASKED.items() if asked["config"]["model_type"] in families.names()])
def test_keys_shapes_dtypes_and_objects_are_those_that_transformer_engine_s_layers_ask_for(name, tmp_path):
    check_keys(ASKED[name], tmp_path)


HYBRID = json.loads(gzip.decompress((GOLDEN / "hybrid_keys.json.gz").read_bytes()))["models"]
"""Of megatron-core's HybridModel, by `tests/golden/make_hybrid_keys.py`."""


@pytest.mark.parametrize("name", HYBRID)
def test_keys_of_layout_hybrid_are_those_that_a_hybrid_model_asks_for(name, tmp_path):
    check_keys(HYBRID[name], tmp_path, layout="hybrid")


def check_keys(asked, tmp_path, **options):
    """What is written of a model of zeros is what was asked for."""
    hf_to_mcore(save_zeros(asked["config"], tmp_path / "hf"), tmp_path / "m", integrity=False, **options)
    tensors, objects = stored_keys(tmp_path / "m" / "iter_0000000")
    stored = {
        key: [[*t.size], str(t.properties.dtype), boxes([c.offsets, c.sizes] for c in t.chunks)] for key, t in tensors.items()
    }
    assert stored == {
        key: [shape, dtype, boxes([at, [*[1] * prepended, *size]] for at, size in chunks)]
        for key, (shape, dtype, prepended, chunks) in asked["tensors"].items()
    }
    assert objects == {*asked["objects"], "common_state/shard_0_1"}


def boxes(chunks):
    """Offsets and sizes of chunks, in order."""
    return sorted((list(offsets), list(sizes)) for offsets, sizes in chunks)
