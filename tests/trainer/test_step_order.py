"""What a step does in which order: a GPU that works off a queue is waited for once, when all work of the step is in it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from tests.trainer import observed, small
from tests.trainer.trials import MOE

READ = {getattr(torch.Tensor, name) for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__")}


class Order(TorchFunctionMode, small.History):
    """Notes in which order gradients are complete, the optimizer takes its step, and numbers are read from the device."""

    def __init__(self) -> None:
        TorchFunctionMode.__init__(self)
        small.History.__init__(self)
        self.noted: list[str] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in READ:
            self.noted.append("read")
        return function(*args, **(kwargs or {}))

    def on_start(self, run: Any) -> None:
        model, optimizer = run.config.model, run.parts.optimizer
        finalize, step = model.finalize_model_grads_func, optimizer.step

        def finalized(*args: Any, **kwargs: Any) -> None:
            finalize(*args, **kwargs)
            self.noted.append("gradients")

        def stepped() -> Any:
            self.noted.append("optimizer")
            return step()

        model.finalize_model_grads_func, optimizer.step = finalized, stepped


def order(changes: dict[str, Any]) -> list[str]:
    """Run on this rank."""
    from trainer.loop import pretrain

    with Order() as seen:
        pretrain(observed.settings(**changes), callbacks=[seen])
    return seen.noted


@pytest.mark.parametrize("changes", [{}, MOE], ids=["dense", "experts"])
def test_no_number_is_read_between_the_gradients_and_the_optimizer(changes, ranks):
    (noted,) = ranks.run(order, 1, changes)
    steps = [at for at, name in enumerate(noted) if name == "gradients"]
    assert [noted[at + 1] for at in steps] == ["optimizer"] * observed.STEPS
    assert all(noted[at + 2] == "read" for at in steps)
