"""The table of dtypes names each as torch, numpy and safetensors do."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import _TYPES

from formats.dtypes import BY_NAME
from formats.spec import DTYPES, OTHER_DTYPES, names_of


@pytest.mark.filterwarnings("ignore:TypedStorage:UserWarning")
@pytest.mark.parametrize("name", BY_NAME)
def test_a_dtype_has_its_names_in_torch_and_safetensors(name):
    names, dtype = BY_NAME[name], (DTYPES | OTHER_DTYPES)[name]
    torch_dtype = getattr(torch, names.torch)
    assert dtype.itemsize == torch_dtype.itemsize
    assert names_of(dtype) is names
    assert _TYPES.get(names.safetensors, torch_dtype) is torch_dtype  # some versions lack the newest
    assert not names.storage or getattr(torch, names.storage).dtype is torch_dtype
