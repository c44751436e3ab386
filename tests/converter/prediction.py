"""Small models with layers of multi-token prediction (MTP): transformers' `MtpModel` beside its model, saved as published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers.modeling_layers import MtpModel

from tests.converter.family_suite import random_model, small_config

FIELD = "num_nextn_predict_layers"
FAMILIES = ("deepseek_v3", "glm4_moe", "glm4_moe_lite")
"""Those of which transformers builds such layers."""


def made(family: str, layers: int = 1, **changes: Any) -> tuple[Any, MtpModel]:
    """A model of transformers and its layers of multi-token prediction, in fp32, with random weights."""
    config = small_config(family, **changes)
    config.num_mtp_layers = layers
    config.mtp_mlp_layer_types = ["sparse"] * layers
    main = random_model(config, dtype="float32")
    further = MtpModel(main, layers).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, tensor in further.layers.state_dict().items():
            center, spread = (1.0, 0.3) if "norm" in name else (0.0, 0.3 if tensor.ndim == 1 else 0.08)
            tensor.copy_(center + spread * torch.randn(tensor.shape, generator=generator))
    return main, further


def opened(folder: Path, layers: int = 1) -> tuple[Any, MtpModel]:
    """The model and its layers of multi-token prediction as transformers reads them of published files."""
    from transformers import AutoModelForCausalLM

    main = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    numbers = range(main.config.num_hidden_layers, main.config.num_hidden_layers + layers)
    main._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{number}\..*" for number in numbers]  # where it looks for them
    return main, MtpModel.from_pretrained(main)


def save(folder: Path, main: Any, further: MtpModel, *, copies: bool = True, configured: int | None = None) -> Path:
    """Write both as they are published: layers numbered on from the model's, and, with `copies`, the embedding and the output
    layer again in each. `configured` is what `config.json` says of their number."""
    main.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, **published(main, further, copies=copies)}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    number = len(further.layers) if configured is None else configured
    (folder / "config.json").write_text(json.dumps({**config, FIELD: number}))
    return folder


def published(main: Any, further: MtpModel, *, copies: bool) -> dict[str, torch.Tensor]:
    """The tensors of layers of multi-token prediction under their published names."""
    tensors: dict[str, torch.Tensor] = {}
    for number, layer in enumerate(further.layers):
        start = f"model.layers.{main.config.num_hidden_layers + number}."
        for name, tensor in layer.state_dict().items():
            tensors |= _separate(start + name.replace("mtp_block.", "").replace("post_norm", "shared_head.norm"), tensor)
        if copies:
            tensors |= {
                f"{start}embed_tokens.weight": main.get_input_embeddings().weight,
                f"{start}shared_head.head.weight": main.lm_head.weight,
            }
    return {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}


def _separate(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """A tensor, or one for each expert where transformers has one for all."""
    start, is_fused, kind = name.partition("mlp.experts.")
    if not is_fused:
        return {name: tensor}
    kinds = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
    return {
        f"{start}{is_fused}{expert}.{projection}.weight": part
        for expert, both in enumerate(tensor)
        for projection, part in zip(kinds, both.chunk(len(kinds)), strict=True)
    }


def logits(main: Any, further: MtpModel, tokens: torch.Tensor) -> list[torch.Tensor]:
    """What transformers computes of [batch, sequence]: logits of the model, then of each further layer, which reads one token
    ahead of the one before; token 0 follows the last."""
    positions = torch.arange(tokens.shape[1])[None].expand_as(tokens)
    hidden = main.model(tokens, use_cache=False).last_hidden_state
    outputs = [main.lm_head(hidden)]
    for layer in range(len(further.layers)):
        tokens = torch.nn.functional.pad(tokens[:, 1:], (0, 1))
        hidden = further.forward_layer(layer, hidden, positions, None, input_ids=tokens)
        outputs.append(main.lm_head(hidden))
    return outputs
