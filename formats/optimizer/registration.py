"""The order in which megatron-core's models register their parameters, which `.metadata` does not say in every case.

Its keys are in this order where one rank of each pipeline stage wrote the whole stage, and not where data-parallel ranks shared
the writing. Source: the constructors of megatron-core 0.19's GPTModel, TransformerLayer, attention, MLP and MoELayer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby

from formats.errors import UserError
from formats.optimizer.parameters import Parameter

Order = Callable[[Parameter], tuple[int, ...]]
"""Returns the position of a parameter in the layer, or among those outside layers."""

_MODEL = ("embedding", "decoder.layers", "decoder.final_", "mtp.layers", "output_layer")
_ATTENTION = (
    "core_attention", "linear_proj", "linear_qkv", "linear_q_proj", "linear_q_down_proj", "linear_q_up_proj",
    "linear_kv_down_proj", "linear_kv_up_proj", "q_layernorm", "k_layernorm", "kv_layernorm",
)  # fmt: skip
_LAYER = (
    "enorm", "hnorm", "eh_proj", "input_layernorm", *(f"self_attention.{module}" for module in _ATTENTION), "pre_mlp_layernorm",
    "mlp.linear_fc1.layer_norm_", "mlp.router", "mlp.fc1_latent_proj", "mlp.fc2_latent_proj", "mlp.experts",
    "mlp.shared_experts.gate_weight", "mlp.shared_experts", "mlp.linear_fc1", "mlp.linear_fc2", "final_layernorm",
)  # fmt: skip
_MODULES = ("word_embeddings", "position_embeddings", "linear_fc1", "linear_fc2")
_PARAMETERS = ("layer_norm_weight", "layer_norm_bias", "weight", "bias")
_OF_PREDICTION = ("transformer_layer.", "mtp_model_layer.")
_INPUT_NORM = "self_attention.linear_qkv.layer_norm_"
"""Where layers without Transformer Engine store their `input_layernorm`, which they register first."""


def orders(parameters: Sequence[Parameter], *, grouped: bool | None) -> Iterator[Order]:
    """Yield the orders in which a model may have registered its parameters, the likeliest first.

    `grouped` says whether the experts are in one module (`moe_grouped_gemm`), None where that is not known.
    """
    grouping = (True, False) if grouped is None else (grouped, not grouped)
    if all(_module_number(_short(parameter.name)) is not None for parameter in parameters if parameter.stack):
        yield from (_by_module(engine, together) for together in grouping for engine in (True, False))
    yield from (_ordered(_by_key(parameters), together) for together in grouping)


def blocks(parameters: Iterable[Parameter]) -> list[list[Parameter]]:
    """Return the parameters in what pipeline stages divide: layers, and what comes before and after them.

    Raises UserError for a model of other parts than a GPTModel's.
    """

    def position(parameter: Parameter) -> tuple[int, int]:
        name = parameter.stack or parameter.name
        part = next((number for number, prefix in enumerate(_MODEL) if name.startswith(prefix)), -1)
        if part < 0:
            raise UserError(
                f"`{name}` is of a model whose optimizer state is not read from buckets: what order its parts have is not known",
                hint="load it in Megatron and save it with `--dist-ckpt-optim-fully-reshardable`",
            )
        return part, parameter.layer

    return [list(block) for _, block in groupby(sorted(parameters, key=position), key=position)]


def _by_module(engine: bool, grouped: bool) -> Order:
    """Return the order of layers with or without Transformer Engine."""

    def position(name: str) -> tuple[int, int, int]:
        short = _short(name)
        first = "input_layernorm" if short.startswith(_INPUT_NORM) and not engine else short
        return (_module_number(first) or 0, *_inner(name))

    return _ordered(position, grouped)


def _by_key(parameters: Iterable[Parameter]) -> Callable[[str], tuple[int, int, int]]:
    """Return the order of the keys in the checkpoint; all experts are where the first key of one is."""
    positions: dict[str, int] = {}
    for parameter in parameters:
        positions.setdefault(_module(parameter.name), len(positions))
    return lambda name: (positions[_module(name)], *_inner(name))


def _module(name: str) -> str:
    before, experts, _ = name.partition(".experts.")
    return before + experts if experts else name


def _ordered(position: Callable[[str], tuple[int, int, int]], grouped: bool) -> Order:
    """Return an order by names. Experts of one module (`grouped`) register a part of all before the next part, others one expert
    after the other."""

    def order(parameter: Parameter) -> tuple[int, ...]:
        module, part, last = position(parameter.name)
        return (module, part, parameter.expert, last) if grouped else (module, parameter.expert, part, last)

    return order


def _inner(name: str) -> tuple[int, int]:
    """Return the position of a parameter's module among those of a module that has several, and its own in that module."""
    module, _, parameter = name.rpartition(".")
    last = module.rpartition(".")[2]
    return (_MODULES.index(last) if last in _MODULES else 0), (_PARAMETERS.index(parameter) if parameter in _PARAMETERS else 0)


def _module_number(name: str) -> int | None:
    """Return the number of the module of a layer that a name begins with, None for one that is not known."""
    return next((number for number, module in enumerate(_LAYER) if name.startswith(module)), None)


def _short(name: str) -> str:
    """Return a name in a layer, also in that of a prediction layer."""
    for prefix in _OF_PREDICTION:
        name = name.removeprefix(prefix)
    return name
