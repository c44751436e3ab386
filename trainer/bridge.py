"""Bridge a Hugging Face directory and Megatron: make a provider of the model it holds, and convert its weights.

Offers `converter` under the names of Megatron-Bridge. Loads no weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import converter
from converter.sources import open_source
from formats.json_objects import read_json
from trainer.model import GPTModelProvider, from_hf_config


@dataclass(frozen=True)
class AutoBridge:
    """A Hugging Face model, known by its `config.json`."""

    source: str
    """The model's directory; for a Hub id, the one in the Hub's cache."""

    config: Mapping[str, Any]

    @classmethod
    def from_hf_pretrained(cls, source: str | Path) -> AutoBridge:
        """Open a directory, a URL or a Hub id. Raises UserError without a readable `config.json`.

        >>> AutoBridge.from_hf_pretrained("Llama-3.2-1B").config["model_type"]
        'llama'
        """
        folder = open_source(source, or_hub=True)
        try:
            return cls(folder.label, read_json(folder, "config.json"))
        finally:
            folder.close()

    def to_megatron_provider(self, load_weights: bool = True) -> GPTModelProvider:
        """Return a provider of this model. With `load_weights`, a run starts from its weights, else from random ones.

        >>> AutoBridge.from_hf_pretrained("Llama-3.2-1B").to_megatron_provider().normalization
        'RMSNorm'
        """
        provider = from_hf_config(self.config, source=self.source)
        provider.pretrained_from = self.source if load_weights else None
        return provider

    @staticmethod
    def import_ckpt(
        huggingface: str | Path, megatron: str | Path, *, tp: int = 1, pp: int = 1, **options: Any
    ) -> converter.Summary:
        """Write a Hugging Face model as a Megatron checkpoint: `converter.hf_to_mcore`.

        >>> AutoBridge.import_ckpt("Llama-3.2-1B", "bridged", tp=2).layout["tp"]
        2
        """
        return converter.hf_to_mcore(huggingface, megatron, tp=tp, pp=pp, **options)

    @staticmethod
    def export_ckpt(megatron: str | Path, huggingface: str | Path, **options: Any) -> converter.Summary:
        """Write a Megatron checkpoint as a Hugging Face model: `converter.mcore_to_hf`.

        >>> AutoBridge.export_ckpt("megatron", "exported").command
        'mcore-to-hf'
        """
        return converter.mcore_to_hf(megatron, huggingface, **options)
