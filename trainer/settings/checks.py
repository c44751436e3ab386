"""What cannot run, found from numbers alone before any process starts: each error names both numbers and a way out.

Knows megatron-core's limits on layouts, batches and schedules. Changes nothing. A model of the user's own is checked in the
fields it has. A few limits that megatron-core states in its own configuration are repeated, with a way out.
"""

from __future__ import annotations

import math
from importlib.util import find_spec
from typing import Any

from formats.errors import UserError
from trainer.config import RunConfig, is_packed
from trainer.settings.precision import Machine, requires

TP, PP, CP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"
VPP, EP, ETP = "virtual_pipeline_model_parallel_size", "expert_model_parallel_size", "expert_tensor_parallel_size"


def size(model: Any, name: str) -> int:
    """A parallel size of a model: 1 where it has none."""
    value = getattr(model, name, None)
    return 1 if value is None else value


def number(model: Any, name: str) -> int | None:
    """A whole number of a model, or None where it has no such field."""
    value = getattr(model, name, None)
    return value if isinstance(value, int) and value > 0 else None


def check_attention(model: Any) -> None:
    """What megatron-core's GPTModel would fail over when it is built."""
    head, kind = getattr(model, "kv_channels", None), getattr(model, "position_embedding_type", None)
    if kind == "rope" and head and head % 2:
        raise UserError(
            f"`model.kv_channels` is `{head}`, and rotary embeddings turn channels in pairs", hint="choose an even number"
        )
    if getattr(model, "multi_latent_attention", False):
        raise UserError(
            "`model.multi_latent_attention` needs megatron-core's MLATransformerConfig, which this provider is not",
            hint="leave it out, or give a model provider of your own",
        )


def check_peft(peft: Any) -> None:
    """What a method of fine-tuning would fail over."""
    if peft is None:
        return
    if not callable(getattr(peft, "transform", None)):
        raise UserError(
            f"`peft` is a `{type(peft).__name__}`, which has no `transform`",
            hint="give it `trainer.peft.LoRA()`, `trainer.peft.DoRA()`, or a method of your own made from `trainer.peft.PEFT`",
        )
    peft.check()


def check_sizes(config: RunConfig) -> None:
    """Numbers that are wrong whatever the others are."""
    for name in (TP, PP, CP, VPP, EP, ETP):
        _least(f"model.{name}", getattr(config.model, name, None), 1)
    for name in ("train_iters", "num_epochs", "global_batch_size", "micro_batch_size", "exit_interval"):
        _least(f"train.{name}", getattr(config.train, name), 1)
    _least("train.manual_gc_interval", config.train.manual_gc_interval, 0)
    _least("validation.eval_interval", config.validation.eval_interval, 1)
    _least("validation.eval_iters", config.validation.eval_iters, 0)
    _least("logger.log_interval", config.logger.log_interval, 1)
    _least("checkpoint.save_interval", config.checkpoint.save_interval, 1)
    _least("checkpoint.keep_last", config.checkpoint.keep_last, 1)
    _least("profiling.profile_step_start", config.profiling.profile_step_start, 1)
    _least("profiling.profile_step_end", config.profiling.profile_step_end, config.profiling.profile_step_start)
    every = "check_weight_hash_across_dp_replicas_interval"
    _least(f"diagnostics.{every}", getattr(config.diagnostics, every), 1)
    _least("diagnostics.straggler_minmax_count", config.diagnostics.straggler_minmax_count, 1)
    _least("scheduler.lr_warmup_iters", config.scheduler.lr_warmup_iters, 0)
    shaped = hasattr(config.model, "make_vocab_size_divisible_by")  # a model of one's own may leave layers at 0
    for name in ("seq_length", "num_layers", "make_vocab_size_divisible_by") if shaped else ():
        _least(f"model.{name}", getattr(config.model, name), 1)
    _least("dataset.sequence_length", getattr(config.dataset, "sequence_length", None), 1)
    _least("dataset.pad_to_multiple_of", getattr(config.dataset, "pad_to_multiple_of", None), 1)
    _least("dataset.num_workers", getattr(config.dataset, "num_workers", None), 0)
    _check_ranges(config)


def _check_ranges(config: RunConfig) -> None:
    """Numbers that are no counts."""
    optimizer, model = config.optimizer, config.model
    for name in ("lr", "clip_grad", "weight_decay"):
        _between(f"optimizer.{name}", getattr(optimizer, name), 0, math.inf)
    for name in ("adam_beta1", "adam_beta2", "sgd_momentum"):
        _between(f"optimizer.{name}", getattr(optimizer, name), 0, 1)
    _between("optimizer.adam_eps", optimizer.adam_eps, 0, math.inf)
    _between("scheduler.lr_warmup_fraction", config.scheduler.lr_warmup_fraction, 0, 1)
    for name in ("hidden_dropout", "attention_dropout"):
        _between(f"model.{name}", getattr(model, name, None), 0, 1)
    # Each pipeline stage adds 100 to the seed, of which numpy takes 32 bits.
    _between("rng.seed", config.rng.seed, 0, 2**32 - 100 * size(model, PP))
    _above("dist.timeout_minutes", config.dist.timeout_minutes)
    _above("dist.step_timeout_minutes", config.dist.step_timeout_minutes)
    _above("train.exit_duration_in_mins", config.train.exit_duration_in_mins)
    _above("checkpoint.save_interval_in_mins", config.checkpoint.save_interval_in_mins)


def _between(setting: str, value: float | None, least: float, end: float) -> None:
    if value is not None and not least <= value < end:
        below = "" if end == math.inf else f" and less than {end}"
        raise UserError(f"`{setting}` is `{value}`", hint=f"choose a finite number of at least {least}{below}")


def _above(setting: str, value: float | None) -> None:
    if value is not None and not 0 < value < math.inf:
        raise UserError(f"`{setting}` is `{value}`", hint="choose a finite number greater than 0")


_OPTIMIZERS = ("adam", "sgd")


def check_optimizer(config: RunConfig) -> None:
    """An optimizer that is here, with what it can do."""
    told = config.optimizer
    if told.optimizer not in _OPTIMIZERS:
        raise UserError(
            f"`optimizer.optimizer` is `{told.optimizer}`, which is not supported",
            hint=f"choose one of: {', '.join(_OPTIMIZERS)}",
        )
    if told.optimizer == "sgd" and (told.use_distributed_optimizer or config.ddp.use_distributed_optimizer):
        raise UserError(
            "`optimizer.optimizer` is `sgd`, which megatron-core does not divide among ranks",
            hint="set `ddp.use_distributed_optimizer=false` and `optimizer.use_distributed_optimizer=false`",
        )
    for name in ("use_megatron_fsdp", "use_custom_fsdp"):
        if getattr(config.ddp, name):
            raise UserError(
                f"`ddp.{name}` is not supported: nothing would be divided", hint="use `ddp.use_distributed_optimizer=true`"
            )


def _least(setting: str, value: float | None, least: int) -> None:
    if value is not None and value < least:
        raise UserError(f"`{setting}` is `{value}`; it must be at least `{least}`", hint=f"set `{setting}={least}` or more")


def data_parallel_size(model: Any, world_size: int) -> int:
    """How many copies of the model there are. UserError where ranks do not divide, for the experts' layout too."""
    tensor, pipeline, context = (size(model, name) for name in (TP, PP, CP))
    one = tensor * pipeline * context
    if world_size % one:
        raise UserError(
            f"`{world_size}` processes are not divisible by `{one}` (TP `{tensor}` × PP `{pipeline}` × CP `{context}`)",
            hint=f"start {one} processes or a multiple of them, or make the model's parallel sizes smaller",
        )
    experts, cut = size(model, EP), size(model, ETP) if getattr(model, ETP, None) else tensor
    if world_size % (cut * experts * pipeline):
        raise UserError(
            f"`{world_size}` processes are not divisible by `{cut * experts * pipeline}` "
            f"(expert TP `{cut}` × EP `{experts}` × PP `{pipeline}`)",
            hint=f"start a multiple of {cut * experts * pipeline} processes, or change `model.{EP}` or `model.{ETP}`",
        )
    return world_size // one


def check_tensor_parallel(model: Any) -> None:
    """Sizes that tensor-parallel ranks divide."""
    cut = size(model, TP)
    for name, what in (("num_attention_heads", "attention heads"), ("ffn_hidden_size", "feed-forward channels")):
        whole = number(model, name)
        if whole and whole % cut:
            raise UserError(
                f"the model's {what}, `{whole}`, are not divisible by `model.{TP}`, `{cut}`",
                hint=f"choose one of: {_divisors(whole)}",
            )
    groups = number(model, "num_query_groups")
    if groups and groups % cut and cut % groups:
        raise UserError(
            f"`model.{TP}` is `{cut}`, which is neither a divisor nor a multiple of the model's query groups, `{groups}`",
            hint=f"choose one of: {_divisors(groups)}, or a multiple of {groups}",
        )
    experts = number(model, "num_moe_experts")
    if experts and experts % size(model, EP):
        raise UserError(
            f"the model's experts, `{experts}`, are not divisible by `model.{EP}`, `{size(model, EP)}`",
            hint=f"choose one of: {_divisors(experts)}",
        )


def _divisors(whole: int) -> str:
    """The divisors that are parallel sizes somebody may want."""
    return ", ".join(str(one) for one in range(1, min(whole, 256) + 1) if whole % one == 0)


_UNEVEN = (
    "pipeline_model_parallel_layout",
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
)


def check_pipeline(model: Any) -> None:
    """Layers divide into stages. Uneven stages that somebody laid out are checked by megatron-core."""
    pipeline, virtual, layers = size(model, PP), size(model, VPP), number(model, "num_layers")
    if virtual > 1 and pipeline == 1:
        raise UserError(
            f"`model.{VPP}` is `{virtual}`, but `model.{PP}` is `1`",
            hint=f"leave out the virtual stages, or set `model.{PP}` to 2 or more",
        )
    if layers and layers % (pipeline * virtual) and not any(getattr(model, name, None) for name in _UNEVEN):
        raise UserError(
            f"the model's `{layers}` layers are not divisible by PP `{pipeline}` × VPP `{virtual}` stages",
            hint="choose sizes whose product divides them, or lay the stages out with `model.pipeline_model_parallel_layout`",
        )


def check_sequence(config: RunConfig) -> None:
    """The sequence fits the model, and its ranks divide it."""
    length, model = number(config.dataset, "sequence_length"), config.model
    if length is None:
        return
    longest = number(model, "seq_length")
    if longest and length > longest:
        raise UserError(
            f"`dataset.sequence_length` is `{length}`, longer than the model's `seq_length`, `{longest}`",
            hint=f"set `dataset.sequence_length={longest}` or less, or `model.seq_length={length}` to go beyond it",
        )
    context, cut = size(model, CP), size(model, TP)
    if context > 1 and length % (2 * context):
        raise UserError(
            f"`dataset.sequence_length` is `{length}`, which is not divisible by 2 × CP `{context}`",
            hint=f"choose a multiple of {2 * context}",
        )
    if getattr(model, "sequence_parallel", False) and length % (context * cut):
        raise UserError(
            f"`dataset.sequence_length` is `{length}`, which is not divisible by CP `{context}` × TP `{cut}`",
            hint=f"choose a multiple of {context * cut}, or set `model.sequence_parallel=false`",
        )


def num_microbatches(config: RunConfig, data_parallel: int) -> int:
    """Microbatches per step and rank. UserError where batches do not divide, or a pipeline with virtual stages lacks some."""
    batch, micro = config.train.global_batch_size, config.train.micro_batch_size
    if batch % (micro * data_parallel):
        raise UserError(
            f"`train.global_batch_size` is `{batch}`, which is not divisible by "
            f"`train.micro_batch_size` `{micro}` × DP `{data_parallel}`",
            hint=f"choose a multiple of {micro * data_parallel}",
        )
    count, pipeline = batch // (micro * data_parallel), size(config.model, PP)
    group = number(config.model, "microbatch_group_size_per_vp_stage") or pipeline
    if size(config.model, VPP) > 1 and (count < group or 0 < count % group < pipeline):
        raise UserError(
            f"virtual pipeline stages take microbatches `{group}` at a time, and a step has `{count}`",
            hint=f"choose `train.global_batch_size` as a multiple of {micro * data_parallel * group}",
        )
    return count


def check_device(config: RunConfig, machine: Machine) -> None:
    """What only Transformer Engine does: context and sequence parallelism."""
    lacking = machine.device == "cpu" or (machine.capability is not None and machine.transformer_engine is None)
    found = "this run is on the CPU" if machine.device == "cpu" else "Transformer Engine is not installed"
    for setting, on in (
        (CP, size(config.model, CP) > 1),
        ("sequence_parallel", getattr(config.model, "sequence_parallel", False)),
    ):
        if on and lacking:
            raise UserError(
                f"`model.{setting}` is `{getattr(config.model, setting)}`, which needs a GPU with Transformer Engine; {found}",
                hint=f"leave `model.{setting}` out",
            )


def check_packed(config: RunConfig, machine: Machine) -> None:
    """What packed rows need of attention, and of their own length."""
    if not is_packed(config.dataset):
        return
    setting = "dataset.packed" if getattr(config.dataset, "packed", False) else "dataset.reset_attention_mask"
    window, multiple = getattr(config.model, "window_size", None), number(config.dataset, "pad_to_multiple_of")
    if window and machine.device == "cpu":
        raise UserError(
            f"`model.window_size` is `{window}`, and megatron-core's attention on the CPU cannot keep packed examples apart too",
            hint=f"set `{setting}=false`",
        )
    if setting == "dataset.reset_attention_mask" and size(config.model, CP) > 1:
        raise UserError(
            f"`{setting}` is `True`, but documents cannot be split over CP `{size(config.model, CP)}` ranks",
            hint=f"set `{setting}=false`, or `model.{CP}=1`",
        )
    if size(config.model, CP) > 1 and config.train.micro_batch_size > 1:
        raise UserError(
            f"`train.micro_batch_size` is `{config.train.micro_batch_size}`, and CP `{size(config.model, CP)}` ranks split "
            "packed rows one at a time",  # seen: with two, Transformer Engine reads beyond its memory
            hint="set `train.micro_batch_size=1`, and a longer `dataset.sequence_length`",
        )
    length, slices = config.dataset.sequence_length, 2 * size(config.model, CP)
    if multiple and slices > 2 and multiple % slices:
        raise UserError(
            f"`dataset.pad_to_multiple_of` is `{multiple}`, which is not divisible by 2 × CP `{slices // 2}`",
            hint="leave it out",
        )
    if multiple and length % multiple:
        raise UserError(
            f"`dataset.sequence_length` is `{length}`, which is not divisible by `dataset.pad_to_multiple_of`, `{multiple}`",
            hint=f"choose a multiple of {multiple}",
        )


def check_samples(config: RunConfig) -> None:
    """Can the model answer while it is trained?"""
    every = config.validation.sample_interval
    reasons = {
        f"model.{CP}={size(config.model, CP)}": size(config.model, CP) > 1,
        "comm_overlap.tp_comm_overlap=true": bool(config.comm_overlap.tp_comm_overlap),
    }
    for setting, holds in reasons.items():
        if every and holds:
            raise UserError(
                f"`validation.sample_interval` is `{every}`, and with `{setting}` no text can be generated",
                hint="leave `validation.sample_interval` out, and generate from checkpoints with `mbtrain generate`",
            )


def check_precision_sizes(config: RunConfig) -> None:
    """FP8 and FP4 matrices have dimensions that are multiples of a block."""
    multiple, model = requires(config.mixed_precision).multiple, config.model
    cut, length = size(model, TP), number(config.dataset, "sequence_length")
    sizes = [(f"model.{name}", number(model, name), parts) for name, parts in (("hidden_size", 1), ("ffn_hidden_size", cut))]
    heads, each = number(model, "num_attention_heads"), number(model, "kv_channels")
    if heads and each:  # without a head size, heads times it is the hidden size
        sizes.append(("attention heads × head size", heads * each, cut))
    if length:
        share = size(model, CP) * (cut if getattr(model, "sequence_parallel", False) else 1)
        sizes.append(("sequence × micro batch", length * config.train.micro_batch_size, share))
    for what, whole, parts in sizes:
        if whole and whole % (multiple * parts):
            raise UserError(
                f"precision `{config.mixed_precision}` needs multiples of `{multiple}` on each rank; "
                f"{what} is `{whole}` over `{parts}` ranks",
                hint=f"choose a multiple of {multiple * parts}, or `mixed_precision=bf16_mixed`",
            )


def check_saving(config: RunConfig) -> None:
    """Checkpoints that are asked for have somewhere to go, and something that writes them."""
    told = config.checkpoint
    if told.save is not None and find_spec("psutil") is None:  # megatron-core's writer asks for it after the first steps only
        raise UserError(
            f"`checkpoint.save` is `{told.save}`, and the package `psutil`, which megatron-core writes checkpoints with, is "
            "not installed",
            hint="pip install 'mbtools[train]', or leave `checkpoint.save` out",
        )
    for name in ("save_interval", "save_interval_in_mins"):
        if getattr(told, name) is not None and told.save is None:
            raise UserError(
                f"`checkpoint.{name}` is `{getattr(told, name)}`, but `checkpoint.save` is not set",
                hint="say where checkpoints go: `checkpoint.save=DIRECTORY`",
            )


def check_schedule(config: RunConfig) -> None:
    """A filled-in schedule that megatron-core can follow."""
    told, optimizer = config.scheduler, config.optimizer
    if optimizer.lr is None:
        raise UserError("`optimizer.lr` is not set", hint="set the highest learning rate, for example `optimizer.lr=3e-4`")
    for low, value in (("optimizer.min_lr", optimizer.min_lr), ("scheduler.lr_warmup_init", told.lr_warmup_init)):
        if not 0 <= value <= optimizer.lr:
            raise UserError(
                f"`{low}` is `{value}`, but `optimizer.lr` is `{optimizer.lr}`", hint=f"choose `{low}` from 0 to `optimizer.lr`"
            )
    if told.lr_warmup_iters >= told.lr_decay_iters:
        raise UserError(
            f"`scheduler.lr_warmup_iters` is `{told.lr_warmup_iters}`, "
            f"but the schedule ends after `scheduler.lr_decay_iters`: `{told.lr_decay_iters}`",
            hint="shorten the warm-up or lengthen the run",
        )
    if told.lr_decay_style == "WSD" and not 0 < (told.lr_wsd_decay_iters or 0) <= told.lr_decay_iters:
        raise UserError(
            f"`scheduler.lr_decay_style` is `WSD`, but `scheduler.lr_wsd_decay_iters` is `{told.lr_wsd_decay_iters}`",
            hint=f"set how many steps the decay at the end takes, from 1 to {told.lr_decay_iters}",
        )
    _check_weight_decay(told)


def _check_weight_decay(told: Any) -> None:
    start, end = told.start_weight_decay, told.end_weight_decay
    if not 0 <= start <= end or (told.weight_decay_incr_style == "constant" and start != end):
        raise UserError(
            f"`scheduler.start_weight_decay` is `{start}` and `scheduler.end_weight_decay` is `{end}`, "
            f"with `scheduler.weight_decay_incr_style={told.weight_decay_incr_style}`",
            hint="weight decay may grow with `linear` or `cosine`, and stays equal with `constant`",
        )
