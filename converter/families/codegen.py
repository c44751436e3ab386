"""CodeGen: GPT-J with query, key and value in one tensor, in four blocks of heads: in each the queries, the values, the keys."""

from collections.abc import Iterator

from converter.config import named
from converter.families import gptj
from converter.model import Model
from converter.rows import RowRange
from converter.rules import Rule

MODELS = "CodeGen"
ARCHITECTURE = "CodeGenForCausalLM"

BLOCKS = 4


def four_blocks(_parts: tuple[int, ...], model: Model) -> Iterator[RowRange]:
    """Yield, head by head, the rows of its query, key and value."""
    heads, rows = model.heads // BLOCKS, model.head_dim
    for head in range(model.heads):
        block, number = divmod(head, heads)
        for made, stored in enumerate((0, 2, 1)):
            source = (block * 3 + stored) * heads + number
            yield RowRange(0, source * rows, (3 * head + made) * rows, rows)


RULES = gptj.decoder(
    Rule("self_attention.linear_qkv.weight", "attn.qkv_proj.weight", (("fused", "hidden"),), four_blocks, partition_dim=0)
)
CONFIG = (*gptj.CONFIG, named(fused=lambda model: 3 * model.queries))
EXTRAS = tuple(f"transformer.h.{{layer}}.attn.{name}" for name in ("causal_mask", "bias", "masked_bias"))
SMALL = gptj.SMALL
PROVIDER = gptj.PROVIDER
