"""What stands between a run and its checkpoints is told before the first step; and a save that fails, by its cause."""

from __future__ import annotations

import errno
import os
import sys

import pytest

from converter import hf_to_mcore
from formats.errors import UserError
from tests.interrupted import with_extras
from tests.trainer import witness
from tests.trainer.settings import settings
from trainer.checkpoints import causes
from trainer.settings.resolve import resolve


def test_what_megatron_core_writes_with_is_asked_for_before_the_first_step(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "psutil", None)
    with pytest.raises(UserError) as error:
        resolve(settings(checkpoint__save=str(tmp_path)), world_size=1, device="cpu")
    assert str(error.value) == (
        f"`checkpoint.save` is `{tmp_path}`, and the package `psutil`, which megatron-core writes checkpoints with, is not "
        "installed\n\nhint: pip install 'mbtools[train]', or leave `checkpoint.save` out"
    )
    resolve(settings(), world_size=1, device="cpu")


@pytest.mark.parametrize(
    ("error", "why", "hint"),
    [
        (OSError(errno.ENOSPC, "?"), os.strerror(errno.ENOSPC), "make room and start again"),
        (OSError(errno.EACCES, "?"), os.strerror(errno.EACCES), "let this user write there"),
        (OSError(errno.EIO, "?"), os.strerror(errno.EIO), "correct what is named"),
        (ModuleNotFoundError("?", name="psutil"), "the package `psutil` is not installed", "install that package on all hosts"),
    ],
)
def test_a_hint_belongs_to_its_cause(error, why, hint, tmp_path):
    message = str(causes.not_saved(error, tmp_path, last_good="no checkpoint was saved yet"))
    assert message.startswith(f"saving `{tmp_path}` failed: {why} (")
    assert f"; no checkpoint was saved yet\n\nhint: {hint}" in message
    assert ("make room" in message) == (error.args[0] == errno.ENOSPC)


def test_tensors_that_megatron_does_not_have_are_in_every_checkpoint(ranks, tmp_path):
    """Also when the checkpoint that a run resumed from is gone by the time it saves."""
    source = with_extras(tmp_path / "hf", 4096, 64)
    (source / "tokenizer.json").unlink()  # which is none
    hf_to_mcore(source, tmp_path / "m")
    extras = (tmp_path / "m" / "iter_0000000" / "huggingface" / "extras.safetensors").read_bytes()
    saving = {"scheduler__lr_warmup_iters": 0, "checkpoint__save_interval": 1, "checkpoint__keep_last": 1}
    saving |= {"checkpoint__save": str(tmp_path / "run"), "train__train_iters": 3}
    ranks.run(witness.train, 1, str(source), {**saving, "train__exit_interval": 1})
    ranks.run(witness.train, 1, str(source), {**saving, "checkpoint__load": str(tmp_path / "run")})
    assert sorted(path.name for path in (tmp_path / "run").glob("iter_*")) == ["iter_0000003"]
    assert (tmp_path / "run" / "iter_0000003" / "huggingface" / "extras.safetensors").read_bytes() == extras
