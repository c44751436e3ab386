"""Dropout is what transformers does in training, or a model is not trained: which numbers it drops, and of what."""

from __future__ import annotations

import pytest

from converter import families
from converter.config import to_huggingface, to_megatron
from formats.errors import UserError
from tests.converter.family_suite import small_config

OF_EMBEDDINGS = {
    "phi": {"resid_pdrop": 0.1, "embd_pdrop": 0.25},
    "gptj": {"resid_pdrop": 0.1, "embd_pdrop": 0.25},
    "gpt2": {"resid_pdrop": 0.1, "embd_pdrop": 0.25},
    "starcoder2": {"residual_dropout": 0.1, "embedding_dropout": 0.25},
    "phi3": {"resid_pdrop": 0.1, "embd_pdrop": 0.25},
    "gpt_neox": {"hidden_dropout": 0.1},
    "bloom": {"hidden_dropout": 0.1},
    "seed_oss": {"residual_dropout": 0.1},
    "opt": {"dropout": 0.1},
}
"""Families, and a dropout of 0.1 of what each branch adds."""


@pytest.mark.parametrize("family", OF_EMBEDDINGS)
def test_a_share_of_embeddings_is_dropped_as_by_transformers(family):
    """What transformers drops is seen in a small model: the modules and functions that a forward pass in training calls."""
    import torch

    from tests.converter.family_suite import small_model
    from trainer.model import from_hf_config

    model = small_model(family, dtype="float32", **OF_EMBEDDINGS[family]).train()
    shares = []
    plain = torch.nn.functional.dropout

    def seen(values, p=0.5, training=True, inplace=False):
        shares.append((values.ndim, p))
        return plain(values, p, training, inplace)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.nn.functional, "dropout", seen)
        model(torch.arange(8)[None])
    hidden = [p for ndim, p in shares if ndim in (2, 3)]  # OPT's feed-forward part has one axis for all tokens
    layers = model.config.num_hidden_layers
    assert len(hidden) in (2 * layers, 2 * layers + 1), "dropout of the two branches, and perhaps of embeddings"
    of_embeddings = hidden[0] if len(hidden) > 2 * layers else 0.0
    provider = from_hf_config(model.config.to_dict())
    assert provider.hidden_dropout == 0.1
    assert (provider.hidden_dropout if provider.embedding_dropout is None else provider.embedding_dropout) == of_embeddings


@pytest.mark.parametrize("family", ["phi", "gptj", "gpt2", "starcoder2", "gpt_neox", "seed_oss", "opt"])
def test_dropout_survives_the_way_to_megatron_and_back(family):
    definition, config = families.find(family), small_config(family, **OF_EMBEDDINGS[family]).to_dict()
    back = to_huggingface(definition.CONFIG, to_megatron(definition.CONFIG, config))
    assert {name: back[name] for name in OF_EMBEDDINGS[family]} == OF_EMBEDDINGS[family]


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("falcon", {"hidden_dropout": 0.1}),
        ("falcon", {"attention_dropout": 0.1}),
        ("stablelm", {"hidden_dropout": 0.1}),
        ("persimmon", {"hidden_dropout": 0.1}),
        ("opt", {"layerdrop": 0.1}),
        ("mpt", {"resid_pdrop": 0.1}),
        ("mpt", {"emb_pdrop": 0.1}),
        ("mpt", {"attn_config": {"attn_pdrop": 0.1}}),
        ("mpt", {"attn_config": {"alibi_bias_max": 16}}),
    ],
)
def test_a_model_that_transformers_trains_otherwise_is_refused_by_name_and_converted(family, changes):
    from trainer.model import from_hf_config

    definition, config = families.find(family), {**small_config(family).to_dict(), **changes}
    with pytest.raises(UserError, match="cannot be trained") as error:
        from_hf_config(config)
    assert all(name in str(error.value) for name in changes.get("attn_config", changes))
    back = to_huggingface(definition.CONFIG, to_megatron(definition.CONFIG, config))
    for name, value in changes.items():
        assert (value.items() <= back[name].items()) if isinstance(value, dict) else back[name] == value
