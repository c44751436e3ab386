"""Load an optimizer's state into another number of parts than saved it.

megatron-core chains one optimizer for dense parameters and one for experts where expert parallelism divides them, and has one for
all otherwise. Tensors are found by their names; settings, such as learning rates and step counts, are stored part by part, as
rank 0 had them.
"""

from __future__ import annotations

from typing import Any

State = dict[Any, Any]


def fit(parts: list[Any], loaded: State, saved: State) -> State:
    """Return the loaded state of an optimizer with as many parts as it has here.

    `parts` are megatron-core's optimizers, and `saved` is what the checkpoint stores for all ranks: settings without tensors.
    """
    chained = {key for key in saved if isinstance(key, int)}
    if max(len(chained), 1) == len(parts):
        return loaded
    settings = saved[min(chained)] if chained else saved
    if len(parts) == 1:
        return _complete(parts[0], {key: value for key, value in loaded.items() if key not in chained}, settings)
    return {number: _complete(part, loaded.get(number, {}), settings) for number, part in enumerate(parts)}


def _complete(part: Any, tensors: State, settings: State) -> State:
    """Return a part's tensors with the settings of a saved one, in this run's parameter groups."""
    wrapped = "optimizer" in settings
    saved, state_of_part = (settings["optimizer"], tensors.get("optimizer", {})) if wrapped else (settings, tensors)
    step = {name: value for name, value in saved["param_groups"][0].items() if name == "step"}
    loaded_groups = state_of_part.get("param_groups", [{}] * len(part.param_groups))
    groups = [
        {**{name: value for name, value in group.items() if name != "params"}, **step, **loaded}
        for group, loaded in zip(part.param_groups, loaded_groups, strict=True)
    ]
    common = {name: value for name, value in saved.get("state", {}).items() if name == "common_step"}
    state = {"state": {**state_of_part["state"], **common}} if "state" in state_of_part else {}
    inner = {**state_of_part, **state, "param_groups": groups}
    return {**settings, **tensors, "optimizer": inner} if wrapped else inner
