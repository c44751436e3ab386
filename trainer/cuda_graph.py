"""Compute the losses and gradients of a step as one CUDA graph: the CPU starts it once, and not each of its kernels.

`model.cuda_graph_impl=full_iteration` asks for it; `settings.cuda_graphs` says what can be captured. A graph reads its inputs
where they were when it was captured, in the same shapes: bounds of segments are therefore padded to a fixed number. What Python
does in a step, hooks of gradients for one, happens once, when the graph is captured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from formats.errors import UserError
from trainer.config import captures_steps
from trainer.loss import Inputs

Compute = Callable[[Iterator[Inputs]], list[torch.Tensor]]
"""Runs megatron-core's schedule over the microbatches of a step, and returns their losses."""

_BEYOND = 64
"""Tokens by which the bound of a row's segments exceeds the row, where a microbatch is one row: see `trainer.loss`."""


def stream(model: Any) -> AbstractContextManager[Any]:
    """Return the context for all of a run's work on the GPU: a stream of its own where steps are captured. CUDA captures none of
    the default one, and gradients are added on the stream on which the model was made."""
    return torch.cuda.stream(torch.cuda.Stream()) if captures_steps(model) else nullcontext()


def refuse(model: Any) -> None:
    """Raise UserError where steps are to be captured: for a forward step of the user's own, whose inputs are not known."""
    if captures_steps(model):
        raise UserError(
            "`model.cuda_graph_impl` is `full_iteration`, and the run has a forward step of its own",
            hint="leave `model.cuda_graph_impl` out",
        )


class StepGraph:
    """Computes steps kernel by kernel at first, and then as one graph, which is captured again when inputs do not fit it."""

    def __init__(self, *, warmup_steps: int, sequence_length: int) -> None:
        """`warmup_steps` are computed kernel by kernel; `sequence_length` is that of a row of packed examples."""
        self._left = warmup_steps
        self._length = sequence_length
        self._segments = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[Inputs] = []
        self._losses: list[torch.Tensor] = []

    def __call__(self, microbatches: Sequence[Inputs], compute: Compute) -> list[torch.Tensor]:
        """Return the losses of a step's microbatches, and add their gradients, as `compute` does. The next call overwrites them.

        Raises UserError where the step cannot be captured.
        """
        inputs = self._fixed(microbatches)
        if self._graph is not None and not _same_shapes(inputs, self._inputs):
            self._graph, self._inputs, self._losses, self._left = None, [], [], 1
        if self._left:
            self._left -= 1
            return compute(iter(inputs))
        if self._graph is None:
            self._capture(inputs, compute)
        else:
            _copy(inputs, self._inputs)
        assert self._graph is not None
        self._graph.replay()
        return self._losses

    def _fixed(self, microbatches: Sequence[Inputs]) -> list[Inputs]:
        """Return the inputs in shapes that those of other steps have too. There is room for more segments than any step had."""
        most = max((len(one.tensors["cu_seqlens"]) - 1 for one in microbatches if "cu_seqlens" in one.tensors), default=0)
        if most > self._segments:
            self._segments = 2 ** most.bit_length()
        return [fix_shapes(one, segments=self._segments, length=self._length) for one in microbatches]

    def _capture(self, inputs: list[Inputs], compute: Compute) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
                self._losses = compute(iter(inputs))
        except RuntimeError as error:
            raise UserError(
                "`model.cuda_graph_impl` is `full_iteration`, and a step of this model cannot be captured as a CUDA graph",
                hint="leave `model.cuda_graph_impl` out",
            ) from error
        self._graph, self._inputs = graph, inputs


def fix_shapes(inputs: Inputs, *, segments: int, length: int) -> Inputs:
    """Return the inputs of a microbatch with bounds of so many segments, of which the last ones are empty, and with a bound for
    their tokens that holds for all rows of `length` tokens. Inputs without segments are returned as they are.

    >>> fixed = fix_shapes(Inputs({"tokens": torch.zeros(1, 8), "cu_seqlens": torch.tensor([0, 3, 8])}), segments=4, length=4)
    >>> fixed.tensors["cu_seqlens"].tolist(), fixed.max_seqlen
    ([0, 3, 8, 8, 8], 4)
    """
    if "cu_seqlens" not in inputs.tensors:
        return inputs
    bounds = inputs.tensors["cu_seqlens"]
    padded = torch.cat((bounds, bounds[-1:].expand(segments + 1 - len(bounds))))
    longest = length if inputs.tensors["tokens"].numel() > length else length + _BEYOND
    return Inputs({**inputs.tensors, "cu_seqlens": padded}, longest)


def _same_shapes(first: Sequence[Inputs], second: Sequence[Inputs]) -> bool:
    return [_shapes(one) for one in first] == [_shapes(one) for one in second]


def _shapes(inputs: Inputs) -> tuple[int, dict[str, torch.Size]]:
    return inputs.max_seqlen, {name: tensor.shape for name, tensor in inputs.tensors.items()}


def _copy(sources: Sequence[Inputs], targets: Sequence[Inputs]) -> None:
    for source, target in zip(sources, targets, strict=True):
        for name, tensor in source.tensors.items():
            target.tensors[name].copy_(tensor)
