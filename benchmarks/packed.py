"""LoRA on packed examples of random tokens: the code that the timed programs share.

Rows are written in the format of `mbtrain pack`, without a tokenizer, and read as a run reads them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

RANK = 32
EXAMPLES = 4000
LENGTHS = (1 / 40, 1 / 2)
"""The shortest and the longest example, as shares of a row: 102 to 2048 tokens of 4096."""


def arguments(text: str | None, *, shapes: tuple[str, ...], adapters: tuple[str, ...]) -> argparse.Namespace:
    """Return the arguments of both loops."""
    parser = argparse.ArgumentParser(description=text)
    parser.add_argument("--shape", choices=shapes, required=True)
    for name in ("sequence", "micro-batch", "microbatches", "steps", "warm-up"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--rows", type=Path, required=True, help="a folder of packed examples")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--adapters", choices=adapters, default=adapters[0])
    parser.add_argument("--fp8", action="store_true", help="current scaling in every layer, as the recipe of that name")
    return parser.parse_args()


def write(folder: Path, *, vocab_size: int, sequence: int) -> None:
    """Write a folder for `dataset.path`. The second half of each example is learned."""
    from trainer.data.chat import packing, store

    train = folder / "train"
    train.mkdir(parents=True)
    description = {"made_of": {"tokenizer": {}}, "said": f"{EXAMPLES} examples of random tokens", "reasons": []}
    generator = np.random.default_rng(0)
    lengths = generator.integers(*(round(sequence * share) for share in LENGTHS), EXAMPLES, endpoint=True)
    rows = packing.best_fit_decreasing(lengths, capacity=sequence)
    description |= {"sequence_length": sequence, "pad_to_multiple_of": 1, "rows": len(rows)}
    store.write(train, _examples(lengths, vocab_size, generator), vocab_size=vocab_size, about=lambda: description)
    for name, array in zip(store.ROWS, (rows.examples, rows.starts), strict=True):
        store.save_array(train / name, array)


def _examples(lengths: np.ndarray, vocab_size: int, generator: np.random.Generator) -> Iterator[Any]:
    from trainer.data.chat.tokenized import Tokenized

    for length in lengths.tolist():
        yield Tokenized(generator.integers(0, vocab_size, length, dtype=np.int32), np.arange(length) >= length // 2)


def microbatches(folder: Path, *, vocab_size: int, sequence: int, micro_batch: int, count: int) -> list[dict[str, Any]]:
    """Return the first `count` microbatches of a run, in its order: tensors [micro batch, sequence] on the CPU."""
    import torch

    from trainer import data
    from trainer.config import FinetuningDatasetConfig

    config = FinetuningDatasetConfig(path=str(folder), sequence_length=sequence)
    rows = data.build(config, tokenizer=None, vocab_size=vocab_size, samples=(micro_batch * count, 0, 0))[0]
    assert rows is not None
    groups = ([rows[number * micro_batch + row] for row in range(micro_batch)] for number in range(count))
    return [{name: torch.stack([row[name] for row in group]) for name in group[0]} for group in groups]


def lora_parameters(provider: Any, rank: int) -> int:
    """Return the parameters of LoRA on the four linear layers of megatron-core's transformer layers."""
    from trainer.estimate.shape import shape_of

    shape = shape_of(provider)
    inner = shape.gates * shape.ffn
    attention = shape.hidden + shape.queries + 2 * shape.keys + shape.queries + shape.hidden
    network = shape.hidden + inner + shape.ffn + shape.hidden
    return shape.layers * rank * (attention + network)


def flops(provider: Any, batches: Sequence[dict[str, Any]]) -> float:
    """Return the FLOPs of training LoRA of rank `RANK` on these microbatches, as `mbtrain` counts them."""
    from trainer import segments
    from trainer.estimate.flops import flops_of_packed
    from trainer.peft import LoRA

    packed_rows = [segments.find_segments(batch["segment_ids"]) for batch in batches]
    tokens, squares = sum(rows.num_tokens for rows in packed_rows), sum(rows.sum_squared_lengths for rows in packed_rows)
    return flops_of_packed(provider, tokens, squares, peft=LoRA(dim=RANK, alpha=RANK))


def provider(shape: str, layers: int | None) -> Any:
    """Return the model provider of a recipe, with `layers` layers if given."""
    from trainer.recipes import find

    model = find(shape).peft_config().model
    model.num_layers = layers or model.num_layers
    return model
