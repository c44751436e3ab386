"""With each version of torch, megatron-core gets the fields of a tensor that it takes, and saves those that all versions read."""

from __future__ import annotations

import pickle

import torch
from torch.distributed.checkpoint.metadata import TensorProperties

from trainer import tensor_properties


def test_a_tensor_is_built_from_the_fields_that_are_read():
    data = pickle.dumps(TensorProperties.create_from_tensor(torch.ones(3, dtype=torch.bfloat16)))
    with tensor_properties.without_strides():
        properties = pickle.loads(data)
        assert properties == pickle.loads(pickle.dumps(properties))
    assert torch.empty(3, **vars(properties), device="meta").dtype == torch.bfloat16


def test_an_index_has_the_fields_that_every_version_of_torch_reads():
    with tensor_properties.without_strides():
        assert len(TensorProperties.create_from_tensor(torch.ones(3)).__getstate__()) == 5
