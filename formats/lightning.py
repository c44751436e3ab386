"""Put the step and the optimizer that NeMo's trainer, PyTorch Lightning's, keeps beside the weights in Megatron's words.

Lightning's checkpoint is a dictionary with `global_step`, `lr_schedulers`, `callbacks` and more. megatron-core's state of the
optimizer is the only item of the list `optimizer` (NeMo 2, `nemo/lightning/pytorch/strategies/megatron_strategy.py`) or
`optimizer_states` (NeMo 1, `nemo/collections/nlp/parts/nlp_overrides.py`). The schedule's state does not say which schedule it is
of, so it has no word here.
"""

from __future__ import annotations

from typing import Any

from formats.spec import is_size

_STEP = "global_step"
_OPTIMIZERS = ("optimizer", "optimizer_states")


def in_megatrons_words(state: Any) -> dict[str, Any]:
    """Return the fields `iteration` and `optimizer` of a common state, as far as a trainer's state has them.

    >>> in_megatrons_words({"global_step": 7, "optimizer_states": [{"optimizer": {}}], "callbacks": {}})
    {'iteration': 7, 'optimizer': {'optimizer': {}}}
    """
    match state:
        case {**fields} | [{**fields}]:
            step, optimizers = fields.get(_STEP), [_only(fields.get(name)) for name in _OPTIMIZERS]
        case _:
            return {}
    optimizer = next((each for each in optimizers if each), None)
    return {**({"iteration": step} if is_size(step) else {}), **({"optimizer": optimizer} if optimizer else {})}


def _only(optimizers: Any) -> dict[Any, Any] | None:
    """Return the state in a list of one; None for everything else."""
    match optimizers:
        case [{**only}]:
            return only
        case _:
            return None
