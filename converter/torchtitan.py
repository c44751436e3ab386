"""Read torchtitan's Llama under the names and in the row order of transformers.

torchtitan rotates neighbouring elements of a head, as Meta's own model does; transformers rotates the first half of a head with
the second. So rows of queries and keys are in another order. Names: torchtitan's `models/llama3/model.py`; before 2026 the
projections were directly in `attention`, and the output layer was `output`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from formats.errors import UserError, format_untrusted
from formats.huggingface_chunks import TITAN, ChunkedReader
from formats.spec import Array, Reader, Region, TensorSpec, is_size

_MODEL = {
    "tok_embeddings.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight", "lm_head.weight": "lm_head.weight",
}  # fmt: skip
_LAYER = {
    "attention.wq.weight": "self_attn.q_proj.weight", "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight", "attention.wo.weight": "self_attn.o_proj.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight", "feed_forward.w3.weight": "mlp.up_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight", "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}  # fmt: skip
_HEADS = {"q_proj.weight": "num_attention_heads", "k_proj.weight": "num_key_value_heads"}


def translated(reader: Reader, config: Mapping[str, Any]) -> Reader:
    """Return a reader of torchtitan's tensors as those of transformers; `reader` itself if it has other names.

    Raises UserError for another model than Llama, and for heads that do not divide the rows.
    """
    if not isinstance(reader, ChunkedReader) or not any(TITAN.fullmatch(name) for name in reader.specs):
        return reader
    if config.get("model_type") != "llama":
        raise UserError(
            f"`{reader.folder.label}` has torchtitan's names, which are known for `llama` alone; its `config.json` "
            + (f"says `{format_untrusted(config.get('model_type'))}`" if config else "is missing"),
            hint="torchtitan's `scripts/checkpoint_conversion/convert_to_hf.py` writes safetensors of its other models",
        )
    return _Translated(reader, config)


class _Translated:
    """The tensors under transformers' names; see `Reader`."""

    def __init__(self, reader: Reader, config: Mapping[str, Any]) -> None:
        self._reader = reader
        self._names = {_name(name): name for name in reader.specs}
        self.specs = {name: replace(reader.specs[theirs], name=name) for name, theirs in self._names.items()}
        self._head_dims = {name: size for name, spec in self.specs.items() if (size := _head_dim(spec, config))}

    def read(self, name: str, region: Region, out: Array) -> None:
        if not (head_dim := self._head_dims.get(name)):
            return self._reader.read(self._names[name], region, out)
        for rows, pairs, odd in _runs(region[0], head_dim):
            scratch = np.empty((pairs.stop - pairs.start, *out.shape[1:]), out.dtype)
            self._reader.read(self._names[name], (pairs, *region[1:]), scratch)
            out[rows.start - region[0].start : rows.stop - region[0].start] = scratch[odd::2]
        return None

    def close(self) -> None:
        self._reader.close()


def _name(name: str) -> str:
    """Return transformers' name of a tensor; other names as they are."""
    if name.startswith("layers."):
        _, number, rest = name.split(".", 2)
        known = _LAYER.get(rest.replace("attention.qkv_linear.", "attention."))
        return f"model.layers.{number}.{known}" if known else name
    return _MODEL.get(name, name)


def _head_dim(spec: TensorSpec, config: Mapping[str, Any]) -> int:
    """Return the rows of a head of a tensor whose rows are in another order; 0 for other tensors."""
    field = next((field for ending, field in _HEADS.items() if spec.name.endswith(ending)), "")
    if not field:
        return 0
    heads: Any = config.get(field) or config.get("num_attention_heads")
    if not is_size(heads) or not heads or not spec.shape or spec.shape[0] % (2 * heads):
        raise UserError(
            f"`{spec.name}` has shape {list(spec.shape)}, and `{field}` is `{format_untrusted(heads)}`: its rows are not "
            "divisible into pairs of as many heads",
            hint="either the weights or `config.json` are of another model",
        )
    return spec.shape[0] // heads


def _runs(rows: slice, head_dim: int) -> Iterator[tuple[slice, slice, int]]:
    """Yield consecutive rows of transformers, the rows of torchtitan among which they are, and whether they are the odd ones.

    >>> list(_runs(slice(2, 6), 8))
    [(slice(2, 4, None), slice(4, 8, None), 0), (slice(4, 6, None), slice(0, 4, None), 1)]
    """
    half = head_dim // 2
    start = rows.start
    while start < rows.stop:
        stop = min(rows.stop, start // half * half + half)
        head, odd, first = start // head_dim * head_dim, start // half % 2, start % half
        yield slice(start, stop), slice(head + 2 * first, head + 2 * (first + stop - start)), odd
        start = stop
