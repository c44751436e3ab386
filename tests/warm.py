"""What processes that stand for GPUs have imported before they are forked: what a run of the trainer imports.

Starts no thread and forms no process group: a forked process inherits neither.
"""
# ruff: noqa: E402, F401

import contextlib
import gc
import importlib
import warnings

warnings.simplefilter("ignore")

import torch

torch.set_num_threads(1)

import hydra.core.override_parser.overrides_parser
import megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader
import megatron.core.dist_checkpointing.strategies.filesystem_async
import megatron.core.dist_checkpointing.strategies.state_dict_saver
import megatron.core.models.gpt.gpt_layer_specs
import megatron.core.models.mimo.optimizer
import omegaconf
import pytest
import tokenizers
import transformers.models.llama.modeling_llama

for name in ("tensorboard", "torch.profiler._cupti_monitor"):
    with contextlib.suppress(ImportError):  # other machines and versions may lack it
        importlib.import_module(name)

import converter.families.llama
import tests.trainer.small
import trainer.generation.checkpoint
import trainer.loop
import trainer.peft
import trainer.settings.overrides

gc.freeze()  # a collection in a forked process would touch, and so copy, every object of these modules
