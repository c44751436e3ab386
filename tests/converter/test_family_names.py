"""The names and shapes of every family are those of published files: `tests/golden/ondisk.json.gz` holds what `save_pretrained`
of transformers 5.24 writes of a small model of each, which undoes the fusions that transformers 5 has in memory."""

from __future__ import annotations

import gzip
import json

import pytest

from converter import families
from converter.config import make_model
from converter.planner import huggingface_tensors
from converter.rules import extra_names
from formats.spec import DTYPES, TensorSpec
from tests.conftest import GOLDEN

ON_DISK = json.loads(gzip.decompress((GOLDEN / "ondisk.json.gz").read_bytes()))

NOT_LISTED = {
    "llama": "the model that transformers builds is compared in test_families.py",
    **dict.fromkeys(
        ("bailing_moe_v2", "baichuan", "chatglm", "internlm2", "kimi_k2", "mimo"),
        "transformers has no class of it: names were read in published listings",
    ),
    **dict.fromkeys(
        ("deepseek_v32", "flint", "glm_moe_dsa", "iquestcoder", "kolibri1"),
        "the list was made without it: the model that transformers builds is compared in test_families.py",
    ),
    **dict.fromkeys(
        ("gemma3", "mistral3", "qwen3_5", "qwen3_5_moe"),
        "a model of images and text: the text has the names of another family, with a prefix",
    ),
}
"""Families that the oracle has not, and why."""


def test_every_family_is_listed_or_there_is_a_reason():
    assert {*families.names()} - {*ON_DISK} - {*NOT_LISTED} == set()


@pytest.mark.parametrize("family", sorted({*families.names()} & {*ON_DISK}))
def test_a_family_has_the_published_names_and_shapes(family):
    published = {name: tuple(shape) for name, shape in ON_DISK[family]["tensors"].items()}
    definition = families.find(family).rooted(published)
    config = {**ON_DISK[family]["config"], "num_nextn_predict_layers": 0}  # of which transformers saves none
    model = make_model(definition.CONFIG, config)
    source = {name: TensorSpec(name, shape, DTYPES["fp32"]) for name, shape in published.items()}
    weights = dict(huggingface_tensors(definition.RULES, model, source))
    extras = {name: published[name] for name in extra_names(definition.EXTRAS, model) & published.keys()}
    assert {**extras, **weights} == published
