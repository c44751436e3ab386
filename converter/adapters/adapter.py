"""What an adapter does to a model, whichever way it is kept: a small change for some of its Hugging Face weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from converter.adapters.description import Description
from formats.spec import Array


@dataclass(frozen=True, slots=True)
class Delta:
    """The change of one weight W, [out, in]: it becomes W + `scale` · `b` · `a`; with a magnitude, each row of that is
    brought to the length that the magnitude says (DoRA, arXiv:2402.09353)."""

    a: Array
    """[rank, in], fp32."""

    b: Array
    """[out, rank], fp32."""

    scale: float
    magnitude: Array | None = None
    """[out], fp32."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter that was opened. Deltas are read one at a time, each when it is asked for."""

    description: Description
    names: frozenset[str]
    """Hugging Face weights that change, such as `model.layers.0.self_attn.q_proj.weight`."""

    read: Callable[[str], Delta]
    """Of one of `names`; KeyError for another weight. May be called from several threads."""

    close: Callable[[], None]
    """Let go of open files."""

    asks_for: Callable[[str], bool] = lambda _weight: False
    """Does the adapter's configuration ask for a change of that weight? Its file may lack it all the same."""

    all_linear: bool = False
    """Does it ask for all linear layers, whichever they are?"""
