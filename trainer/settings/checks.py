"""Refuse what cannot run, from numbers alone and before any process starts: each error names both values and a way out.

Covers megatron-core's limits on layouts, batches and schedules; ranges of single numbers are in `ranges`. Changes nothing. A
model of the user's own is checked in the fields it has. A few limits that megatron-core states in its own configuration are
repeated here, with a hint.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer import MLATransformerConfig

from converter import families
from converter.adapters.adapter import METHODS, Description
from converter.adapters.exportable import refuse_unexportable
from converter.config import make_model
from trainer.config import CheckpointConfig, DistributedDataParallelConfig, RunConfig, SchedulerConfig, TrainingConfig, is_packed
from trainer.layers.pattern import GATED_DELTA_NET
from trainer.settings.precision import Machine, requires
from trainer.settings.rules import Rule, enforce

TP, PP, CP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"
VPP, EP, ETP = "virtual_pipeline_model_parallel_size", "expert_model_parallel_size", "expert_tensor_parallel_size"


def parallel_size(model: Any, name: str) -> int:
    """Return a parallel size of a model: 1 where it has none."""
    value = getattr(model, name, None)
    return 1 if value is None else value


def positive(section: Any, name: str) -> int | None:
    """Return a positive integer of a section, or None where it has no such field."""
    value = getattr(section, name, None)
    return value if isinstance(value, int) and value > 0 else None


def check_attention(model: Any) -> None:
    """Refuse what megatron-core's GPTModel would fail on when it is built."""
    head, kind = getattr(model, "kv_channels", None), getattr(model, "position_embedding_type", None)
    odd_head = f"`model.kv_channels` is `{head}`, and rotary embeddings rotate channels in pairs"
    mla = getattr(model, "multi_latent_attention", False) and not isinstance(model, MLATransformerConfig)
    other = "`model.multi_latent_attention` needs megatron-core's MLATransformerConfig, which this provider is not"
    enforce((
        (kind == "rope" and head and head % 2, odd_head, "choose an even number"),
        (mla, other, "leave it out, or start from the `config.json` of a model that has it"),
    ))  # fmt: skip


def check_peft(peft: Any, model: Any) -> None:
    """Refuse a fine-tuning method that cannot be attached, and adapters of a Hugging Face model that could not be exported."""
    if peft is None:
        return
    message = f"`peft` is a `{type(peft).__name__}`, which has no `transform`"
    hint = "give it `trainer.peft.LoRA()`, `trainer.peft.DoRA()`, or a method of your own made from `trainer.peft.PEFT`"
    enforce([(not callable(getattr(peft, "transform", None)), message, hint)])
    peft.check()
    _check_export(peft, model)


def _check_export(peft: Any, model: Any) -> None:
    config, method = getattr(model, "hf_config", None), type(peft).__name__.lower()
    if not config or method not in METHODS:
        return
    family = families.find(config.get("model_type"), getattr(model, "layout", None)).as_modules()
    names = {name: tuple(getattr(peft, name)) for name in ("target_modules", "exclude_modules")}
    description = Description(method, canonical=peft.canonical, **names)
    sizes, trains_mtp = make_model(family.CONFIG, config), bool(getattr(model, "mtp_num_layers", None))
    refuse_unexportable(family.RULES, sizes, description, trains_mtp=trains_mtp)


_OPTIMIZERS = ("adam", "sgd")


def check_optimizer(optimizer: OptimizerConfig, ddp: DistributedDataParallelConfig) -> None:
    """Refuse an optimizer that is not supported, and what the chosen one cannot do."""
    name, sharded = optimizer.optimizer, optimizer.use_distributed_optimizer or ddp.use_distributed_optimizer
    rules: list[Rule] = [
        (
            name not in _OPTIMIZERS,
            f"`optimizer.optimizer` is `{name}`, which is not supported",
            f"choose one of: {', '.join(_OPTIMIZERS)}",
        ),
        (
            name == "sgd" and sharded,
            "`optimizer.optimizer` is `sgd`, which megatron-core does not divide among ranks",
            "set `ddp.use_distributed_optimizer=false` and `optimizer.use_distributed_optimizer=false`",
        ),
    ]
    for fsdp in ("use_megatron_fsdp", "use_custom_fsdp"):
        message = f"`ddp.{fsdp}` is not supported: nothing would be divided"
        rules.append((getattr(ddp, fsdp), message, "use `ddp.use_distributed_optimizer=true`"))
    enforce(rules)


def data_parallel_size(model: Any, world_size: int) -> int:
    """Return the number of copies of the model. Raises UserError where the number of ranks is not divisible by one copy's, or by
    the experts' layout."""
    tensor, pipeline, context = (parallel_size(model, name) for name in (TP, PP, CP))
    experts, expert_tensor = parallel_size(model, EP), getattr(model, ETP, None) or tensor
    copy, grid = tensor * pipeline * context, expert_tensor * experts * pipeline
    enforce((
        (
            world_size % copy,
            f"`{world_size}` processes are not divisible by `{copy}` (TP `{tensor}` × PP `{pipeline}` × CP `{context}`)",
            f"start {copy} processes or a multiple of them, or make the model's parallel sizes smaller",
        ),
        (
            world_size % grid,
            (f"`{world_size}` processes are not divisible by `{grid}` "
            f"(expert TP `{expert_tensor}` × EP `{experts}` × PP `{pipeline}`)"),
            f"start a multiple of {grid} processes, or change `model.{EP}` or `model.{ETP}`",
        ),
    ))  # fmt: skip
    return world_size // copy


def check_tensor_parallel(model: Any) -> None:
    """Refuse sizes that are not divisible among tensor-parallel and expert-parallel ranks."""
    enforce(_tensor_parallel_rules(model))


def _tensor_parallel_rules(model: Any) -> Iterator[Rule]:
    tensor, experts = parallel_size(model, TP), parallel_size(model, EP)
    for what, name, axis, parts in (
        ("attention heads", "num_attention_heads", TP, tensor),
        ("feed-forward channels", "ffn_hidden_size", TP, tensor),
        ("experts", "num_moe_experts", EP, experts),
    ):
        if total := positive(model, name):
            message = f"the model's {what}, `{total}`, are not divisible by `model.{axis}`, `{parts}`"
            yield total % parts, message, f"choose one of: {_divisors(total)}"
    if groups := positive(model, "num_query_groups"):
        yield (
            groups % tensor and tensor % groups,
            f"`model.{TP}` is `{tensor}`, which is neither a divisor nor a multiple of the model's query groups, `{groups}`",
            f"choose one of: {_divisors(groups)}, or a multiple of {groups}",
        )


def _divisors(total: int) -> str:
    """List the divisors that are plausible parallel sizes."""
    return ", ".join(str(size) for size in range(1, min(total, 256) + 1) if total % size == 0)


_UNEVEN = (
    "pipeline_model_parallel_layout",
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
)


def check_pipeline(model: Any) -> None:
    """Refuse layers that are not divisible into stages. An uneven layout is left to megatron-core's own check."""
    pipeline, virtual, layers = parallel_size(model, PP), parallel_size(model, VPP), positive(model, "num_layers")
    uneven = any(getattr(model, name, None) for name in _UNEVEN)
    enforce((
        (
            virtual > 1 and pipeline == 1,
            f"`model.{VPP}` is `{virtual}`, but `model.{PP}` is `1`",
            f"leave out the virtual stages, or set `model.{PP}` to 2 or more",
        ),
        (
            layers and layers % (pipeline * virtual) and not uneven,
            f"the model's `{layers}` layers are not divisible by PP `{pipeline}` × VPP `{virtual}` stages",
            "choose sizes whose product divides them, or lay the stages out with `model.pipeline_model_parallel_layout`",
        ),
    ))  # fmt: skip


def check_prediction(model: Any) -> None:
    """Refuse layers of multi-token prediction on another stage than the last, once megatron-core has read the layout: only the
    first and the last stage get tokens."""
    message = "`model.pipeline_model_parallel_layout` has layers of multi-token prediction (`m`) before the last stage"
    enforce([(getattr(model, "mtp_standalone", False), message, "put them with the loss, as in `...|mL`")])


def check_sequence(model: Any, dataset: Any) -> None:
    """Refuse a sequence that is longer than the model's, or not divisible among its ranks."""
    length = positive(dataset, "sequence_length")
    if length is None:
        return
    longest, context, tensor = positive(model, "seq_length") or length, parallel_size(model, CP), parallel_size(model, TP)
    indivisible = f"`dataset.sequence_length` is `{length}`, which is not divisible by"
    enforce((
        (
            length > longest,
            f"`dataset.sequence_length` is `{length}`, longer than the model's `seq_length`, `{longest}`",
            f"set `dataset.sequence_length={longest}` or less, or `model.seq_length={length}` to go beyond it",
        ),
        (
            context > 1 and length % (2 * context),
            f"{indivisible} 2 × CP `{context}`",
            f"choose a multiple of {2 * context}",
        ),
        (
            getattr(model, "sequence_parallel", False) and length % (context * tensor),
            f"{indivisible} CP `{context}` × TP `{tensor}`",
            f"choose a multiple of {context * tensor}, or set `model.sequence_parallel=false`",
        ),
    ))  # fmt: skip


def num_microbatches(train: TrainingConfig, model: Any, data_parallel: int) -> int:
    """Return the microbatches per step on each rank. Raises UserError where the batch is not divisible, or a pipeline with
    virtual stages would lack some."""
    batch, micro = train.global_batch_size, train.micro_batch_size
    copies, pipeline = micro * data_parallel, parallel_size(model, PP)
    count, group = batch // copies, positive(model, "microbatch_group_size_per_vp_stage") or pipeline
    enforce((
        (
            batch % copies,
            (f"`train.global_batch_size` is `{batch}`, which is not divisible by "
            f"`train.micro_batch_size` `{micro}` × DP `{data_parallel}`"),
            f"choose a multiple of {copies}",
        ),
        (
            parallel_size(model, VPP) > 1 and (count < group or 0 < count % group < pipeline),
            f"virtual pipeline stages take microbatches `{group}` at a time, and a step has `{count}`",
            f"choose `train.global_batch_size` as a multiple of {copies * group}",
        ),
    ))  # fmt: skip
    return count


def check_device(model: Any, machine: Machine) -> None:
    """Refuse context parallelism where Transformer Engine, which implements it, cannot run."""
    on_cpu = machine.device == "cpu"
    lacking = on_cpu or (machine.capability is not None and machine.transformer_engine is None)
    why, context = "this run is on the CPU" if on_cpu else "Transformer Engine is not installed", parallel_size(model, CP)
    message = f"`model.{CP}` is `{context}`, which needs a GPU with Transformer Engine; {why}"
    enforce([(context > 1 and lacking, message, f"leave `model.{CP}` out")])


def check_packed(config: RunConfig, machine: Machine) -> None:
    """Refuse what attention cannot do over packed rows, and lengths that do not fit them."""
    if is_packed(config.dataset):
        setting = "dataset.packed" if getattr(config.dataset, "packed", False) else "dataset.reset_attention_mask"
        enforce(_packed_attention(config.model, machine, setting))
        enforce(_packed_lengths(config, setting))


def _packed_attention(model: Any, machine: Machine, setting: str) -> Iterator[Rule]:
    window = getattr(model, "window_size", None)
    yield (
        window and machine.device == "cpu",
        f"`model.window_size` is `{window}`, and megatron-core's attention on the CPU cannot keep packed examples apart too",
        f"set `{setting}=false`",
    )
    net, on_cpu = getattr(model, "experimental_attention_variant", None), machine.device == "cpu"
    where = "layers on the CPU" if on_cpu else "deterministic layers (`model.deterministic_mode`)"
    yield (
        net == GATED_DELTA_NET and (on_cpu or getattr(model, "deterministic_mode", False)),
        f"`model.experimental_attention_variant` is `{net}`, whose {where} take one packed example for the start of the next",
        f"set `{setting}=false`",
    )
    ahead = getattr(model, "mtp_num_layers", None)
    yield (
        ahead and machine.device == "cpu",
        f"`model.mtp_num_layers` is `{ahead}`, and on the CPU tokens ahead would be those of other packed examples",
        f"set `{setting}=false`",
    )


def _packed_lengths(config: RunConfig, setting: str) -> Iterator[Rule]:
    dataset, micro, context = config.dataset, config.train.micro_batch_size, parallel_size(config.model, CP)
    multiple = positive(dataset, "pad_to_multiple_of") or 1
    yield (
        setting == "dataset.reset_attention_mask" and context > 1,
        f"`{setting}` is `True`, but documents cannot be split over CP `{context}` ranks",
        f"set `{setting}=false`, or `model.{CP}=1`",
    )
    yield (
        context > 1 and micro > 1,  # with two rows, Transformer Engine reads beyond its memory
        f"`train.micro_batch_size` is `{micro}`, and CP `{context}` ranks split packed rows one at a time",
        "set `train.micro_batch_size=1`, and a longer `dataset.sequence_length`",
    )
    yield (
        context > 1 and multiple > 1 and multiple % (2 * context),
        f"`dataset.pad_to_multiple_of` is `{multiple}`, which is not divisible by 2 × CP `{context}`",
        "leave it out",
    )
    yield (
        dataset.sequence_length % multiple,
        (
            f"`dataset.sequence_length` is `{dataset.sequence_length}`, which is not divisible by `dataset.pad_to_multiple_of`, "
            f"`{multiple}`"
        ),
        f"choose a multiple of {multiple}",
    )


def check_samples(config: RunConfig) -> None:
    """Refuse sample answers during training where the layout cannot generate text."""
    interval = config.validation.sample_interval
    obstacles = {
        f"model.{CP}={parallel_size(config.model, CP)}": parallel_size(config.model, CP) > 1,
        "comm_overlap.tp_comm_overlap=true": config.comm_overlap.tp_comm_overlap,
    }
    for setting, on in obstacles.items():
        message = f"`validation.sample_interval` is `{interval}`, and with `{setting}` no text can be generated"
        hint = "leave `validation.sample_interval` out, and generate from checkpoints with `mbtrain generate`"
        enforce([(interval and on, message, hint)])


def check_precision_sizes(config: RunConfig) -> None:
    """Refuse matrices that are not divisible into the blocks of FP8 and FP4."""
    multiple = requires(config.mixed_precision).multiple
    for what, total, parts in _matrix_sizes(config):
        message = (
            f"precision `{config.mixed_precision}` needs multiples of `{multiple}` on each rank; "
            f"{what} is `{total}` over `{parts}` ranks"
        )
        hint = f"choose a multiple of {multiple * parts}, or `mixed_precision=bf16_mixed`"
        enforce([(total % (multiple * parts), message, hint)])


def _matrix_sizes(config: RunConfig) -> Iterator[tuple[str, int, int]]:
    """Yield each matrix dimension that blocks divide: its name, its size, and the ranks that divide it."""
    model = config.model
    tensor, length = parallel_size(model, TP), positive(config.dataset, "sequence_length")
    expert_tensor = getattr(model, ETP, None) or tensor
    sizes = (("hidden_size", 1), ("ffn_hidden_size", tensor), ("moe_ffn_hidden_size", expert_tensor))
    for name, parts in (*sizes, ("moe_shared_expert_intermediate_size", tensor)):
        if total := positive(model, name):
            yield f"model.{name}", total, parts
    heads, channels = positive(model, "num_attention_heads"), positive(model, "kv_channels")
    if heads and channels:  # without a head size, heads times it is the hidden size
        yield "attention heads × head size", heads * channels, tensor
    if length:
        parts = parallel_size(model, CP) * (tensor if getattr(model, "sequence_parallel", False) else 1)
        yield "sequence × micro batch", length * config.train.micro_batch_size, parts


def check_saving(checkpoint: CheckpointConfig) -> None:
    """Refuse checkpoints without a folder to go to, or without the package that writes them."""
    message = (
        f"`checkpoint.save` is `{checkpoint.save}`, and the package `psutil`, which megatron-core writes checkpoints with, is "
        "not installed"
    )
    # megatron-core's writer imports it after the first steps only.
    missing = checkpoint.save is not None and find_spec("psutil") is None
    rules: list[Rule] = [(missing, message, "pip install 'mbtools[train]', or leave `checkpoint.save` out")]
    for name in ("save_interval", "save_interval_in_mins"):
        value = getattr(checkpoint, name)
        message = f"`checkpoint.{name}` is `{value}`, but `checkpoint.save` is not set"
        hint = "name the folder for checkpoints: `checkpoint.save=DIRECTORY`"
        rules.append((value is not None and checkpoint.save is None, message, hint))
    enforce(rules)


def check_schedule(scheduler: SchedulerConfig, optimizer: OptimizerConfig) -> None:
    """Refuse a filled-in schedule that megatron-core's scheduler would assert on."""
    enforce(_schedule_rules(scheduler, optimizer))


def _schedule_rules(scheduler: Any, optimizer: OptimizerConfig) -> Iterator[Rule]:
    highest, warm_up, decay = optimizer.lr, scheduler.lr_warmup_iters, scheduler.lr_decay_iters
    yield highest is None, "`optimizer.lr` is not set", "set the highest learning rate, for example `optimizer.lr=3e-4`"
    for low, rate in (("optimizer.min_lr", optimizer.min_lr), ("scheduler.lr_warmup_init", scheduler.lr_warmup_init)):
        message = f"`{low}` is `{rate}`, but `optimizer.lr` is `{highest}`"
        yield not 0 <= rate <= highest, message, f"choose `{low}` from 0 to `optimizer.lr`"
    yield (
        warm_up >= decay,
        f"`scheduler.lr_warmup_iters` is `{warm_up}`, but the schedule ends after `scheduler.lr_decay_iters`: `{decay}`",
        "shorten the warm-up or lengthen the run",
    )
    wsd = scheduler.lr_wsd_decay_iters
    yield (
        scheduler.lr_decay_style == "WSD" and not 0 < (wsd or 0) <= decay,
        f"`scheduler.lr_decay_style` is `WSD`, but `scheduler.lr_wsd_decay_iters` is `{wsd}`",
        f"set how many steps the decay at the end takes, from 1 to {decay}",
    )
    start, end, style = scheduler.start_weight_decay, scheduler.end_weight_decay, scheduler.weight_decay_incr_style
    yield (
        not 0 <= start <= end or (style == "constant" and start != end),
        (
            f"`scheduler.start_weight_decay` is `{start}` and `scheduler.end_weight_decay` is `{end}`, "
            f"with `scheduler.weight_decay_incr_style={style}`"
        ),
        "weight decay may grow with `linear` or `cosine`, and stays equal with `constant`",
    )
