"""GLM-5: DeepSeek-V3.2 in other sizes. Layers may take over the tokens that an indexer before them chose, and have none then."""

from dataclasses import replace

from converter.config_latent import index_sharing, indexer, latent, latent_rope
from converter.config_parts import dimension, rms_norm, sizes
from converter.config_router import best_groups, kinds_of_layers, shared_multiple, sigmoid_scores
from converter.families import deepseek_v3, deepseek_v32, llama, mixtral
from converter.model import Model
from converter.rules import Indices

MODELS = "GLM-5"
ARCHITECTURE = "GlmMoeDsaForCausalLM"


def has_indexer(model: Model, indices: Indices) -> bool:
    """Return whether the layer chooses tokens itself."""
    return indices["layer"] in model.indexed


INDEXER = tuple(replace(rule, when=has_indexer) for rule in deepseek_v32.INDEXER)
RULES = (
    *llama.decoder(*deepseek_v32.LATENT, *INDEXER, *mixtral.mixed(llama.MLP, deepseek_v3.SPARSE)),
    *deepseek_v3.prediction(*deepseek_v32.LATENT, *deepseek_v32.INDEXER, *deepseek_v3.SPARSE),
)
CONFIG = (
    *sizes(head_dim="", positions_default=202752),
    *deepseek_v3.SIZES,
    *rms_norm(default=1e-5),
    *dimension("value", "v_head_dim", default=256),
    *latent(q_lora=2048, kv_lora=512, plain=192, turned=64),
    latent_rope("default", "yarn"),
    *indexer(heads=32, interleaved=True),
    index_sharing(),
    kinds_of_layers(3),
    *sigmoid_scores(scale=2.5),
    best_groups(1, 1, best=2),
    *shared_multiple(1),
    *deepseek_v3.CHOICE,
)
EXTRAS = deepseek_v3.EXTRAS
SMALL = {**deepseek_v32.SMALL, "n_group": 1, "topk_group": 1, "indexer_types": ["full", "full", "full", "shared"]}
PROVIDER = deepseek_v3.PROVIDER
