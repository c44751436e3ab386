"""Apertus' activation has weights that every tensor-parallel rank holds whole: a run saves one of each."""

from __future__ import annotations

from converter import mcore_to_hf
from tests import models
from tests.converter.family_suite import small_model
from tests.trainer import small

TP2 = {"model__tensor_model_parallel_size": 2}


def test_what_a_run_on_two_ranks_saves_is_the_model_that_it_began_with(ranks, tmp_path):
    folder = models.save(small_model("apertus", dtype="float32"), tmp_path / "hf")
    still = {"train__train_iters": 1, "optimizer__lr": 0.0, "optimizer__min_lr": 0.0, "scheduler__lr_warmup_iters": 0}
    ranks.run(small.train, 2, str(folder), {**still, **TP2, "checkpoint__save": str(tmp_path / "run")})
    mcore_to_hf(tmp_path / "run", tmp_path / "back")
    assert models.model_tree(tmp_path / "back") == models.model_tree(folder)
