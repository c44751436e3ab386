"""FP8 state is unpickled by names that build tensors and recipes. The recipes need Transformer Engine: see test_gpu_resume."""

from __future__ import annotations

import io
import os
import pickle

import pytest
import torch

from formats.errors import UserError
from trainer.checkpoints import fp8_states


class _Calls:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_scales_and_histories_come_back_bit_for_bit():
    state = {"scale_fwd": torch.rand(3), "amax_history_fwd": torch.rand(1024, 3), "extra_fp8_variables": {"num_gemms": 1}}
    loaded = fp8_states.loads(pickle.dumps(state))
    assert loaded["extra_fp8_variables"] == {"num_gemms": 1}
    for name in ("scale_fwd", "amax_history_fwd"):
        assert torch.equal(loaded[name], state[name])


def test_a_state_that_names_anything_else_is_refused_before_it_runs(tmp_path):
    mark = tmp_path / "it ran"
    with pytest.raises(UserError, match=r"names `posix\.mkdir`"):
        fp8_states.loads(pickle.dumps({"recipe": _Calls(os.mkdir, str(mark))}))
    assert not mark.exists()


def test_a_storage_that_names_anything_else_is_refused_before_it_runs(tmp_path):
    mark = tmp_path / "it ran"
    file = io.BytesIO()
    torch.save({"storage": _Calls(os.mkdir, str(mark))}, file, _use_new_zipfile_serialization=False)
    inside = pickle.dumps(_Calls(torch.storage._load_from_bytes, file.getvalue()))
    with pytest.raises(UserError, match="holds a storage that names something else"):
        fp8_states.loads(inside)
    assert not mark.exists()
