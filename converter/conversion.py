"""A conversion that is ready to run: its plan, and the opened source that the bytes come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from converter.comparison import CheckpointView
from converter.conversion_plan import ConversionPlan
from formats.folder import FileRef, Folder
from formats.spec import Reader


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """A plan and its source. The target is chosen when it is executed; the caller closes `reader`."""

    plan: ConversionPlan
    reader: Reader
    """Holds the tensors that the plan's tensors are made of."""

    views: Callable[[Folder], tuple[CheckpointView, CheckpointView]]
    """Open a written output: the source and the output, as `--verify` compares them."""

    copies: Mapping[str, FileRef] = field(default_factory=dict[str, FileRef])
    """The side files to copy, by their names in the output's folder."""

    check: Callable[[], None] = lambda: None
    """Raise UserError for numbers in the source that cannot be converted. Reads tensors, which planning does not."""

    memory: int = 0
    """Bytes that reading the source holds at most, beside what is read."""
