"""A Megatron checkpoint with some of what it holds replaced: its weights, its folder's documents, Megatron-LM's `args`.

A command that changes weights reads this in place of the checkpoint, and plans its output as that of a reshard to the same
layout.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from converter.conversion import Conversion
from converter.conversion_plan import manifest
from converter.hybrid import PATTERN, STAGE
from converter.nemo_config import settings_of
from converter.pipeline_layout import parse_layout
from formats.chunks import Chunk
from formats.folder import FileRef, Folder
from formats.megatron_reader import MegatronReader
from formats.pickles import Record
from formats.spec import Array, Reader, Region, is_size


class DerivedCheckpoint:
    """An opened iteration; see `MegatronReader`. `weights` reads its weights, all of `checkpoint`'s in its order."""

    def __init__(
        self,
        checkpoint: MegatronReader,
        weights: Reader,
        *,
        folder: Folder | None = None,
        args: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """`folder`: default the checkpoint's own. `args`: what Megatron-LM's say instead."""
        self.folder = folder or checkpoint.folder
        self.specs = weights.specs
        self._checkpoint, self._weights, self._args = checkpoint, weights, args
        self.settings = checkpoint.settings

    @property
    def files(self) -> Collection[str]:
        return self._checkpoint.files

    @property
    def index_files(self) -> Collection[str]:
        return self._checkpoint.index_files

    @property
    def others(self) -> Sequence[str]:
        return self._checkpoint.others

    @property
    def has_optimizer(self) -> bool:
        return self._checkpoint.has_optimizer

    @property
    def contents(self) -> Collection[str]:
        return self._checkpoint.contents

    def args(self) -> Mapping[str, Any]:
        """See `MegatronReader.args`."""
        return {**self._checkpoint.args(), **self._args}

    def common_state(self) -> Mapping[str, Any]:
        """See `MegatronReader.common_state`."""
        state = self._checkpoint.common_state()
        match state.get("args"):
            case Record(state={**fields}) as args if self._args:
                return {**state, "args": Record(args.kind, args.args, {**fields, **self._args}, args.made_by_call)}
            case _:
                return state

    def check(self, names: Iterable[str] | None = None) -> None:
        """See `MegatronReader.check`."""
        self._checkpoint.check(names)

    def chunks(self, name: str) -> Sequence[Chunk]:
        """See `MegatronReader.chunks`."""
        return self._checkpoint.chunks(name)

    def read(self, name: str, region: Region, out: Array) -> None:
        self._weights.read(name, region, out)

    def close(self) -> None:
        self._weights.close()
        self._checkpoint.close()


def parallel_sizes_of(reader: MegatronReader) -> dict[str, Any]:
    """Return the layout that a checkpoint's settings say it was saved in, as keyword arguments of `ReshardOptions`; where they
    say nothing, one rank."""
    recorded = settings_of(reader)
    settings: Mapping[str, Any] = recorded[0].settings if recorded else {}

    def size(name: str) -> int | None:
        value = settings.get(name)
        return value if is_size(value) and value else None

    experts = any(".experts." in name for name in reader.specs)  # Megatron-LM records sizes where there are none
    stages = settings.get("pipeline_model_parallel_layout")
    pattern = settings.get(PATTERN)
    stages = pattern if isinstance(pattern, str) and STAGE in pattern else stages
    return {
        "tp": size("tensor_model_parallel_size") or 1,
        "pp": size("pipeline_model_parallel_size") or 1,
        "vpp": size("virtual_pipeline_model_parallel_size") or 1,
        "pp_layout": parse_layout(stages) if isinstance(stages, str) else None,
        "ep": (size("expert_model_parallel_size") if experts else None) or 1,
        "etp": size("expert_tensor_parallel_size") if experts else None,
    }


def of_command(
    conversion: Conversion,
    command: str,
    *,
    options: Mapping[str, Any],
    fields: Mapping[str, Any],
    files: Mapping[str, FileRef],
) -> Conversion:
    """Return a conversion that is recorded as one of `command`, with its `options` and `fields`, and that reads `files` too."""
    plan = conversion.plan
    recorded = {**plan.provenance.fields, **fields}
    recorded["options"] = {**recorded["options"], **options}
    return replace(
        conversion,
        plan=replace(
            plan,
            provenance=replace(plan.provenance, command=command, fields=recorded),
            manifest={**plan.manifest, **manifest(command, options, files)},
            identity={**plan.identity, "command": command, **options},
        ),
    )
