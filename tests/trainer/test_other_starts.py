"""A run starts from the weights that other programs saved as from the Hugging Face directory of the same weights."""

from __future__ import annotations

import json
import shutil

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from converter import hf_to_mcore, verify
from tests.converter.test_chunked_models import as_titan
from tests.trainer import small

TWO_STEPS = {"train__train_iters": 2, "scheduler__lr_warmup_iters": 0}


def losses(ranks, folder, source, **changes):
    (seen,) = ranks.run(small.train, 1, str(folder), {**TWO_STEPS, "checkpoint__pretrained_checkpoint": str(source), **changes})
    return seen.losses


def test_a_run_starts_from_what_torchtitan_and_nemo_saved(ranks, model_folder, tmp_path):
    folder = model_folder("gqa")
    state, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    expected = losses(ranks, folder, folder)
    titan = as_titan(state, before_2026=False, heads=(config["num_attention_heads"], config["num_key_value_heads"]))
    dcp.save({**titan, "optimizer": {"step": torch.ones(())}}, checkpoint_id=tmp_path / "titan", no_dist=True)
    shutil.copy(folder / "config.json", tmp_path / "titan")
    assert losses(ranks, folder, tmp_path / "titan", checkpoint__save=str(tmp_path / "run")) == expected
    assert not list((tmp_path / "run").rglob("huggingface/**/*.distcp"))
    hf_to_mcore(folder, tmp_path / "m")
    shutil.move(tmp_path / "m" / "iter_0000000", tmp_path / "nemo" / "weights")
    (tmp_path / "nemo" / "context").mkdir()
    assert verify(tmp_path / "nemo", folder).same
    assert losses(ranks, folder, tmp_path / "nemo") == expected
