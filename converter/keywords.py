"""Keyword arguments that have another name now, or another name in Megatron."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps


def other_names[**P, R](**names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a function to answer other names of its keyword arguments with TypeError and the name to write.

    >>> @other_names(cast="cast_to")
    ... def verify(*, cast_to=None): ...
    >>> verify(cast="bf16")
    Traceback (most recent call last):
    TypeError: `verify` has no argument `cast`; write `cast_to`
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if other := next((name for name in names if name in kwargs), None):
                raise TypeError(f"`{function.__name__}` has no argument `{other}`; write `{names[other]}`")
            return function(*args, **kwargs)

        return call

    return decorate


IN_MEGATRON = {
    "expert_model_parallel_size": "ep",
    "expert_tensor_parallel_size": "etp",
    "pipeline_model_parallel_layout": "pp_layout",
    "pipeline_model_parallel_size": "pp",
    "tensor_model_parallel_size": "tp",
    "virtual_pipeline_model_parallel_size": "vpp",
}
"""Megatron's names of the arguments that lay a checkpoint out."""
