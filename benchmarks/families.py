"""What holds for each family, as a table of Markdown: read off the family's file, and off what the tests of all families run.

python -m benchmarks.families            print it
python -m benchmarks.families --write    put it into docs/families-matrix.md
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from converter import families
from converter.config import to_megatron
from converter.config_parts import NOT_COMPUTED
from formats.errors import UserError
from tests.converter.family_suite import LAYOUTS, MORE_RUNS, RUNS, small_config

PAGE = Path(__file__).parents[1] / "docs" / "families-matrix.md"

HEADER = """\
# Families, one by one

Made by `python -m benchmarks.families --write`; a test checks that it is current.

For every family `tests/converter/test_families.py` builds a small model with transformers and checks

- weights: names and shapes against the model's own, and the same bytes after the way there and back, at {layouts};
- configuration: `config.json` to Megatron's fields and back, against transformers' configuration class;
- trains: the model that `mbtrain` builds loads the checkpoint strictly, and its logits equal transformers' in fp32, at {runs}
  (marked `slow`: {more}).

*provider* are the fields of `mbtrain`'s `GPTModelProvider` that the family sets and megatron-core does not have. *rope* are the
scalings of rotary embeddings that are read.

"""
COLUMNS = ("model_type", "architecture", "models", "weights", "config", "trains", "provider", "rope", "what differs")

ROPES: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 128},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "dynamic": {"factor": 4.0},
    "longrope": {
        "factor": 4.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 64,
    },
}  # fmt: skip


def main() -> None:
    """Print the page, or write it."""
    if "--write" in sys.argv[1:]:
        PAGE.write_text(page())
    else:
        print(page(), end="")


def page() -> str:
    """Return the whole page."""
    layouts = "one rank" + "".join(
        f", {' '.join(f'{key} {size}' for key, size in layout.items())}" for layout in LAYOUTS if layout
    )
    header = HEADER.format(layouts=layouts, runs=", ".join(RUNS), more=", ".join(MORE_RUNS))
    rows = [COLUMNS, ["---"] * len(COLUMNS), *(_row(name, families.find(name)) for name in families.names())]
    return header + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _row(name: str, family: families.Family) -> list[str]:
    config = small_config(name).to_dict()
    kinds = [kind for kind in ROPES if _reads(family, config, kind)]
    return [
        f"`{name}`",
        f"`{family.ARCHITECTURE}`",
        family.MODELS,
        "yes",
        "both ways",
        "yes" if family.trains else "no",
        ", ".join(f"`{requirement}`" for requirement in family.PROVIDER),
        ", ".join(kinds),
        "; ".join(_differences(family, to_megatron(family.CONFIG, config), kinds)),
    ]


def _reads(family: families.Family, config: dict[str, Any], kind: str) -> bool:
    """Does a family's CONFIG take this scaling of rotary embeddings, of all layers or of those that do not slide?"""
    base = {key: value for key, value in config.items() if key != "rope_parameters"}
    plain = {"rope_type": "default", "rope_theta": 10000.0}
    scaled = {**plain, "rope_type": kind, **ROPES[kind]}
    by_type = {"rope_parameters": {"full_attention": scaled, "sliding_attention": plain}}
    return any(_changes(family, base, changes) for changes in ({"rope_scaling": scaled}, by_type))


def _changes(family: families.Family, config: dict[str, Any], changes: dict[str, Any]) -> bool:
    """Are Megatron's fields others with what is said beside `config`?"""
    try:
        return to_megatron(family.CONFIG, config) != to_megatron(family.CONFIG, {**config, **changes})
    except UserError:
        return False


def _differences(family: families.Family, fields: dict[str, Any], kinds: list[str]) -> Iterator[str]:
    """Yield what a model of the family computes otherwise than transformers, or not at all."""
    if family.WEIGHTS_ONLY:
        yield family.WEIGHTS_ONLY
    for name in NOT_COMPUTED:
        if name in fields:
            yield f"`{name}` is not computed: {NOT_COMPUTED[name]}"
    longest = [kind for kind in ("dynamic", "longrope") if kind in kinds]
    if longest or fields.get("exact_sequence_length"):
        yield f"exact up to the original length{f' with {" or ".join(longest)} rope' if longest else ''}"
    if fields.get("multi_latent_attention"):
        yield "the norms of MLA have `layernorm_epsilon`, where transformers has 1e-6 in all models"
    if fields.get("experimental_attention_variant") == "dsa":
        yield "the indexer of sparse attention is not trained, as in transformers; TP needs `sequence_parallel`"
    if fields.get("use_mup"):
        yield "in bf16 transformers rounds the multipliers of embeddings and logits"


if __name__ == "__main__":
    main()
