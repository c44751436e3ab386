"""What stands between a run and its checkpoints is told before the first step; and a save that fails, by its cause."""

from __future__ import annotations

import errno
import os
import sys

import pytest

from formats.errors import UserError
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
    said = str(causes.not_saved(error, tmp_path, last_good="no checkpoint was saved yet"))
    assert said.startswith(f"saving `{tmp_path}` failed: {why} (")
    assert f"; no checkpoint was saved yet\n\nhint: {hint}" in said
    assert ("make room" in said) == (error.args[0] == errno.ENOSPC)
