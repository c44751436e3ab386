"""Headers of safetensors files: each kind of tensor is checked once, and no other passes for it."""

from __future__ import annotations

import pytest

from formats.errors import UserError
from formats.huggingface import make_header, parse_shard
from formats.spec import DTYPES, TensorSpec


@pytest.mark.parametrize("written", [b"[1.0]", b"[true]", b'"[1]"', b"[-1]", b"[[1]]"])
def test_a_shape_that_looks_like_one_known_already_is_refused(written):
    raw = make_header([TensorSpec(name, (1,), DTYPES["uint8"]) for name in ("a", "b")])
    before, _, after = raw[8:].rpartition(b"[1]")
    header = before + written + after
    with pytest.raises(UserError, match="`b` has shape"):
        parse_shard(len(header).to_bytes(8, "little") + header, source="file")
