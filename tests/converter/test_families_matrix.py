"""What is said of each family is so: the page made of the directory, and the fields of the provider that each names."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, fields

import pytest
from megatron.core.models.gpt import GPTModel
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.transformer import MLATransformerConfig

from benchmarks.families import PAGE, page
from converter import families
from tests.converter.family_suite import small_config
from trainer.model import MLAModelProvider, from_hf_config


def test_the_page_of_families_is_current():
    assert PAGE.read_text() == page(), "run `python -m benchmarks.families --write`"


MEGATRON = (
    {field.name for field in fields(MLATransformerConfig)}
    | {name for model in (GPTModel, HybridModel) for name in inspect.signature(model.__init__).parameters}
    | {"seq_length", "layout"}
)
"""What megatron-core has a name for: `seq_length` is its models' `max_sequence_length`, `layout` says which of them. It reads
`yarn_` from its config too."""

OWN = {
    field.name: field.default_factory() if field.default_factory is not MISSING else field.default
    for field in fields(MLAModelProvider)
    if field.name not in MEGATRON and not field.name.startswith(("yarn_", "hf_"))
}


@pytest.mark.parametrize("family", [name for name in families.names() if families.find(name).trains])
def test_a_family_names_the_fields_of_the_provider_that_it_sets(family):
    """Some are set by other models of the family than the small one: Falcon RW's, InternLM 2's for long contexts."""
    provider = from_hf_config(small_config(family).to_dict())
    named = {name.partition("=")[0] for name in families.find(family).PROVIDER}
    assert {name for name, default in OWN.items() if getattr(provider, name, default) != default} <= named
    assert named <= OWN.keys() | {"activation_func"}
