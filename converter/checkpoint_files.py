"""Lay out the files of a plan's weights in each format that is written: `torch_dist`, files of ranks, Megatron-FSDP's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, starmap
from typing import Any, NamedTuple

from converter.config import Config
from converter.extra_states import stateful_module, weightless_modules
from converter.layout import Layout
from converter.megatron_args import arguments_of, common_state
from converter.planner import Plan, sharded
from converter.rank_layout import rank_files_writer
from converter.state_dicts import TRANSFORMER_ENGINE, weight_name
from converter.values import KEEP, dtype_of_most_parameters
from formats.dcp_index import METADATA
from formats.errors import UserError
from formats.fsdp_writer import FsdpTensor, FsdpWriter
from formats.iterations import FSDP_DTENSOR, RELEASE, TORCH, TORCH_DIST, iteration_folder
from formats.outputs import Writer
from formats.rank_names import GATED
from formats.spec import TensorSpec
from formats.torch_dist_writer import RunState, ShardedTensor, TorchDistWriter

MASTERS = "fp32"
"""What Megatron-FSDP holds weights in: they are the optimizer's."""


class CheckpointFormat(NamedTuple):
    """A format, and the layers whose names its state dicts have: `--ckpt-format` and `--transformer-impl` of Megatron-LM."""

    name: str = TORCH_DIST
    implementation: str = TRANSFORMER_ENGINE

    @property
    def folder(self) -> str:
        """The folder of the files, with a slash at its end."""
        return f"{RELEASE if self.name == TORCH else iteration_folder(0)}/"

    @property
    def last(self) -> tuple[str, ...]:
        """The files that make an iteration readable."""
        return () if self.name == TORCH else (METADATA,)

    @property
    def options(self) -> dict[str, str]:
        """What `conversion.json` says of it; nothing of `torch_dist`, which has names of its own."""
        named = {"ckpt_format": self.name, "transformer_impl": self.implementation}
        return {} if self.name == TORCH_DIST else named

    def dtype(self, wanted: str) -> str:
        """Return the dtype that weights are written in. Raises UserError for another than Megatron-FSDP's."""
        if self.name != FSDP_DTENSOR:
            return wanted
        if wanted not in (KEEP, MASTERS):
            raise UserError(
                f"`--dtype {wanted}`, but Megatron-FSDP holds weights in {MASTERS}: they are the optimizer's too",
                hint=f"leave `--dtype` out; in training, `--bf16` makes it compute in bf16 from weights in {MASTERS}",
            )
        return MASTERS


def writer_of(kind: CheckpointFormat, plan: Plan, layout: Layout, megatron: Config, *, vocab_multiple: int) -> Writer:
    """Return the files of a plan's weights in a layout. `megatron`: the model's fields. One rank's vocabulary is padded to a
    multiple of `vocab_multiple` rows. Raises UserError for what the format cannot hold."""
    if kind.name == TORCH_DIST:
        return weights_writer(plan, layout, megatron)
    dtype = dtype_of_most_parameters(tensor_plan.spec for tensor_plan in plan.tensors)
    arguments = arguments_of(
        megatron, plan.model, layout, dtype=dtype, vocab_multiple=vocab_multiple, ckpt_format=kind.name,
        implementation=kind.implementation,
    )  # fmt: skip
    common = common_state(arguments, 0)
    if kind.name == TORCH:
        return rank_files_writer(plan, layout, megatron, common, kind.implementation)
    return _fsdp_writer(plan, layout, megatron, common, kind.implementation)


def weights_writer(
    plan: Plan,
    layout: Layout,
    megatron: Config,
    *,
    iteration: int = 0,
    states: Sequence[Mapping[str, TensorSpec]] = (),
    run: RunState | None = None,
) -> TorchDistWriter:
    """Return the files of a plan's weights in a layout. `megatron`: the model's fields. `states`: optimizer state by the names of
    the weights, which it is divided like; `run`: what else there is of a training run."""
    model, scope = plan.model, megatron.get("qk_layernorm_scope", "head")
    hybrid, last = model.get("hybrid", False), layout.rank(layout.stage(model.megatron_layers), 0)
    weights = starmap(ShardedTensor, sharded(plan, layout))
    if states:  # each goes through them again
        weights = list(weights)
    divided_alike = (ShardedTensor(of[spec.name], chunks) for of in states for spec, chunks in weights if spec.name in of)
    weightless = list(weightless_modules({tensor_plan.spec.name for tensor_plan in plan.tensors}, hybrid=hybrid))
    return TorchDistWriter(
        chain(weights, divided_alike),
        iteration=iteration,
        stacked=model.get("stacked", True),
        stateful_module=partial(stateful_module, hybrid=hybrid, own_head_norms=scope != "head"),
        weightless=dict.fromkeys(weightless, last),
        run=run,
    )


def _fsdp_writer(plan: Plan, layout: Layout, megatron: Config, common: Mapping[str, Any], implementation: str) -> FsdpWriter:
    if layout.pp > 1:
        raise UserError(
            f"Megatron-FSDP divides layers, and has no pipeline stages: `--pp` is {layout.pp}", hint="leave `--pp` out"
        )
    if plan.model.get("hybrid", False) or megatron.get("mtp_num_layers"):
        what = "layers of multi-token prediction" if megatron.get("mtp_num_layers") else "layout hybrid"
        raise UserError(f"`--ckpt-format {FSDP_DTENSOR}` is written of GPT models without {what}", hint="`torch_dist` holds them")
    return FsdpWriter(_fsdp_tensors(plan, layout, implementation), common)


def _fsdp_tensors(plan: Plan, layout: Layout, implementation: str) -> Iterator[FsdpTensor]:
    for (rule, indices), (spec, chunks) in zip(plan.bound_rules, sharded(plan, layout), strict=True):
        gated = rule.partition_stride == 2 and GATED in spec.name
        if rule.partition_stride > 1 and not gated:
            raise UserError(f"`{spec.name}` has sections, whose names in format `{FSDP_DTENSOR}` are not known here")
        yield FsdpTensor(spec, weight_name(rule, indices, implementation), gated, chunks)
