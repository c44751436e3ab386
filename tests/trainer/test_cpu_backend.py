"""What stands in for a GPU is quiet about itself alone."""

from __future__ import annotations

import logging

import torch

from trainer import cpu_backend

NAME = "megatron.core.tensor_parallel.random"


def _draw(tracker):
    with tracker.fork("dropout"):
        torch.rand(1)


def _heard(caplog):
    return [message for logger, _, message in caplog.record_tuples if logger == NAME]


def test_a_draw_on_the_cpu_is_no_warning_and_all_others_are_heard(caplog):
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    caplog.set_level(logging.WARNING, logger="megatron")  # which `trainer.warnings_filter` may have raised
    tracker = CudaRNGStatesTracker()
    with cpu_backend.activate():
        tracker.add("dropout", 1)
        _draw(tracker)
        assert _heard(caplog) == []
        logging.getLogger(NAME).warning("another")
        assert _heard(caplog) == ["another"]


def test_outside_of_it_megatron_core_warns_as_ever(caplog, monkeypatch):
    from megatron.core.tensor_parallel import random

    caplog.set_level(logging.WARNING, logger="megatron")
    with cpu_backend.activate():
        pass
    monkeypatch.setattr(random, "_get_cuda_rng_state", lambda *_, **__: torch.get_rng_state())
    monkeypatch.setattr(random, "_set_cuda_rng_state", lambda state, *_, **__: torch.set_rng_state(state))
    tracker = random.CudaRNGStatesTracker()
    tracker.states_["dropout"] = torch.get_rng_state()
    _draw(tracker)
    assert _heard(caplog) == ["CPU RNG state changed within GPU RNG context"]
