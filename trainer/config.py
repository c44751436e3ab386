"""The settings of a run, as dataclasses with Megatron's field names.

Holds no default that depends on a model or a machine: recipes set the first, `resolve` the second.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from megatron.core import distributed
from megatron.core.optimizer import OptimizerConfig

FilePath = Annotated[str, "a path"]
"""A file or a folder; a leading `~` is the home directory (`trainer.settings.paths`)."""

Blend = list[Any]
"""Prefixes of files, or weights and prefixes in turns."""

Learned = Literal["all_answers", "last_answer", "each_answer"]
"""Which of a conversation's answers are learned; `each_answer` makes an example of each, with what was said before it."""


@dataclass(kw_only=True)
class DistributedDataParallelConfig(distributed.DistributedDataParallelConfig):
    """megatron-core's class, with a field that the precision may choose."""

    grad_reduce_in_fp32: bool | None = None  # type: ignore[assignment]
    """None for what `mixed_precision` says."""


@dataclass(kw_only=True)
class TrainingConfig:
    """How long, and how many sequences at a time."""

    train_iters: int = 100
    """Optimizer steps of the whole run, those before a resume included."""

    num_epochs: int | None = None
    """How many times to go through the training data; `train_iters` then follows from it. None for `train_iters` as it is."""

    global_batch_size: int = 8
    """Sequences per optimizer step, over all data-parallel ranks."""

    micro_batch_size: int = 1
    """Sequences that one rank computes at a time."""

    exit_interval: int | None = None
    """Save and stop after a step that this divides."""

    exit_duration_in_mins: float | None = None
    """Save and stop after so many minutes, the start of the program included; in a program that trains several times, each of the
    later runs has its own."""

    manual_gc_interval: int = 100
    """Steps between Python's garbage collections, so that all ranks pause together; 0 leaves it to Python."""


@dataclass(kw_only=True)
class ValidationConfig:
    """How often, and on how much held-out data."""

    eval_interval: int | None = 100
    """Steps between evaluations; None for none before the end."""

    eval_iters: int | None = 10
    """Global batches per evaluation, at most until each held-out sample was seen once; None for all of them, 0 for none."""

    sample_interval: int | None = None
    """Steps between answers to `sample_prompts` in the log; None for none."""

    sample_prompts: list[str] = field(default_factory=list)
    sample_tokens: int = 64
    """The longest answer."""


@dataclass(kw_only=True)
class SchedulerConfig:
    """The learning rate and weight decay over the run (megatron-core's OptimizerParamScheduler), in steps."""

    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = "cosine"
    lr_decay_iters: int | None = None
    """Steps until `optimizer.min_lr`; None for `train.train_iters`."""

    lr_warmup_iters: int = 0
    lr_warmup_fraction: float | None = None
    """Warm-up as a share of `lr_decay_iters`, instead of `lr_warmup_iters`."""

    lr_warmup_init: float = 0.0
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = "exponential"
    lr_wsd_decay_iters: int | None = None
    start_weight_decay: float | None = None
    """None for `optimizer.weight_decay`."""

    end_weight_decay: float | None = None
    weight_decay_incr_style: Literal["constant", "linear", "cosine"] = "constant"


@dataclass(kw_only=True)
class DatasetConfig:
    """Where tokens come from. With neither `blend` nor `blend_per_split`, mock data."""

    sequence_length: int = 1024
    """Tokens per training sequence."""

    blend: Blend | None = None
    """Prefixes of `.bin`/`.idx` pairs, or weights and prefixes in turns: `[0.3, a_text, 0.7, b_text]`."""

    blend_per_split: list[Blend | None] | None = None
    """The same for train, validation and test, each from its own files."""

    multiple_validation_sets: bool = False
    """Evaluate each prefix of the blends for validation and test by itself."""

    split: str = "969,30,1"
    """Shares of the documents for train, validation and test, where `blend` is one for all."""

    random_seed: int = 1234
    path_to_cache: FilePath | None = None
    """Where the indices of shuffled documents are kept; None for a folder beside the data."""

    num_workers: int = 2
    """Processes that read ahead, per rank; 0 reads in the training process."""

    reset_position_ids: bool = False
    reset_attention_mask: bool = False
    """Documents in a sequence do not see those before them."""

    eod_mask_loss: bool = False
    """Leave the first token after each end-of-document token out of the loss. The end-of-document token itself is learned."""


@dataclass(kw_only=True)
class FinetuningDatasetConfig:
    """Examples to learn answers from: conversations (`messages`), or `prompt` and `completion`."""

    sequence_length: int = 2048
    """Tokens per training sequence; longer examples are cut."""

    path: FilePath | None = None
    """JSON lines, parquet, a folder of Hugging Face `datasets`, one on the Hub (`hf://datasets/org/name@revision`), or a folder
    that `mbtrain pack` made."""

    blend: Blend | None = None
    """Several of those in place of `path`, or weights and sources in turns: `[0.3, a.jsonl, 0.7, b.jsonl]`."""

    validation_path: FilePath | list[FilePath] | None = None
    """What is held out; several are evaluated each by itself."""

    test_path: FilePath | list[FilePath] | None = None
    split: str = "95,5,0"
    """Shares of the examples of `path` for train, validation and test, where those have no files of their own."""

    packed: bool = True
    """Several examples in one sequence, none of which sees another; without it each has a sequence of its own."""

    pad_to_multiple_of: int | None = None
    """What lengths of packed examples are brought up to a multiple of; None for what context parallelism needs, 2 × its size."""

    chat_template: FilePath | None = None
    """A file with a Jinja template, in place of the tokenizer's own."""

    prompt_template: str = "{prompt}"
    """What the model is shown before it answers, where examples are prompts and completions."""

    learn: Learned = "all_answers"
    """Which answers of a conversation are learned. `last_answer`, or `each_answer` in an example of its own, for templates that
    change earlier turns when others follow: Qwen3's with thoughts, Mistral's with a system prompt."""

    ignore_fields: list[str] = field(default_factory=list)
    """Fields of examples and of messages to read as if they were not there. Others that would be lost are errors."""

    skip_bad: bool = False
    """Count examples that cannot be used, instead of stopping at the first."""

    random_seed: int = 1234
    path_to_cache: FilePath | None = None
    """Where tokens are kept from one start to the next; None for a folder beside the data."""

    num_workers: int = 2
    """Processes that read ahead, per rank; 0 reads in the training process."""


def captures_steps(model: Any) -> bool:
    """Return whether steps of a model are to be computed as one CUDA graph."""
    return getattr(model, "cuda_graph_impl", "none") == "full_iteration"


def is_packed(dataset: Any) -> bool:
    """Return whether the samples of a dataset section have `segment_ids`: rows of several documents or examples."""
    documents = getattr(dataset, "blend", None) or getattr(dataset, "blend_per_split", None)  # mock data has no documents
    return bool(getattr(dataset, "packed", False) or (documents and getattr(dataset, "reset_attention_mask", False)))


@dataclass(kw_only=True)
class TokenizerConfig:
    """The tokenizer: needed for end-of-document ids and generation, and saved with checkpoints."""

    tokenizer_model: FilePath | None = None
    """A folder with `tokenizer.json`, or `byte`; None for the model's own, where it has one."""


@dataclass(kw_only=True)
class LoggerConfig:
    """What is logged of a run, and where."""

    log_interval: int = 10
    """Steps per line."""

    run_dir: FilePath | None = None
    """Where `metrics.jsonl` and plots go; None for `checkpoint.save`, if that is given."""

    tensorboard_dir: FilePath | None = None
    wandb_project: str | None = None
    wandb_exp_name: str | None = None
    wandb_entity: str | None = None
    wandb_save_dir: FilePath | None = None
    wandb_mode: Literal["online", "offline"] = "online"


@dataclass(kw_only=True)
class CheckpointConfig:
    """What a run starts from, and what it saves."""

    save: FilePath | None = None
    """The folder that checkpoints go to; None for none."""

    load: FilePath | None = None
    """A folder of this trainer's checkpoints to resume from: weights, optimizer, data position. One without checkpoints
    starts anew, so that `load` and `save` may be the same from the first start on. Where `save` is another folder and holds
    checkpoints of this run, it goes on from those."""

    overwrite: bool = False
    """Start although `save` holds another run's checkpoints: those of the same steps are replaced, the others stay."""

    pretrained_checkpoint: FilePath | None = None
    """Weights to start from where there is nothing to resume: a Megatron checkpoint or a Hugging Face directory."""

    random_weights: bool = False
    """Allow fine-tuning from random weights, as benchmarks do. Ignored by pretraining."""

    pretrained_adapter: FilePath | None = None
    """Adapters to start from beside those weights: a checkpoint of this trainer, or of `mbconvert adapter-to-mcore`."""

    save_interval: int | None = None
    """Steps between checkpoints; the last step always saves."""

    save_interval_in_mins: float | None = None
    """Minutes between checkpoints. Where neither interval is set it is 30, and `keep_last` is 5 unless it is set."""

    save_optim: bool = True
    save_rng: bool = True
    async_save: bool = False
    """Write while training goes on."""

    keep_last: int | None = None
    """Remove all but so many of this run's newest checkpoints; None keeps all."""

    fully_parallel_save: bool = True
    """Data-parallel ranks share the writing."""

    optim_sharding: Literal["fully_reshardable", "dp_reshardable"] = "fully_reshardable"
    """`dp_reshardable` saves faster, and resumes at the same TP and PP only."""

    verify_integrity: bool = False
    """Write the sha256 of every file, and check them on load."""


@dataclass(kw_only=True)
class RNGConfig:
    """Random numbers: initial weights and dropout."""

    seed: int = 1234


@dataclass(kw_only=True)
class DistConfig:
    """Processes and what they run on."""

    device: Literal["auto", "cpu", "gpu"] = "auto"
    """`auto`: GPUs where there are any."""

    timeout_minutes: float = 10.0
    """How long a rank waits for the others before it gives up."""

    step_timeout_minutes: float | None = None
    """The same after the first step, when nothing is built or compiled any more: longer than an evaluation and a checkpoint
    take. None for `timeout_minutes`."""


@dataclass(kw_only=True)
class ProfilingConfig:
    """What is recorded of some steps, by Megatron's names; files go to `profile` in the run's folder."""

    use_pytorch_profiler: bool = False
    """A trace by torch's profiler."""

    use_nsys_profiler: bool = False
    """The range of `nsys profile --capture-range=cudaProfilerApi`."""

    record_memory_history: bool = False
    """A snapshot of the GPU's memory after the last of the steps, and one when it is full, in whatever step."""

    profile_step_start: int = 10
    profile_step_end: int = 12
    """The last step that is recorded."""

    profile_ranks: list[int] = field(default_factory=lambda: [0])
    record_shapes: bool = False
    """Shapes of tensors in torch's trace."""


@dataclass(kw_only=True)
class DiagnosticsConfig:
    """What is checked of machines while a run goes on, by Megatron's names."""

    check_weight_hash_across_dp_replicas_interval: int | None = None
    """Steps between comparisons of the weights on data-parallel ranks; None for none."""

    gpu_sniff_test: bool = False
    """Measure every GPU and link before the first step."""

    log_straggler: bool = False
    """Log the slowest and the fastest ranks at every `logger.log_interval`."""

    straggler_minmax_count: int = 1
    """How many of each."""


@dataclass(kw_only=True)
class CommOverlapConfig:
    """Which communication overlaps with computation; None lets `overlap` choose."""

    tp_comm_overlap: bool | None = None
    overlap_p2p_comm: bool | None = None
    batch_p2p_comm: bool | None = None
    overlap_grad_reduce: bool | None = None
    overlap_param_gather: bool | None = None


@dataclass(kw_only=True)
class RunConfig:
    """A whole run."""

    model: Any
    """Builds the model: `trainer.model.GPTModelProvider`, or an object of your own with its methods."""

    train: TrainingConfig = field(default_factory=TrainingConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    dataset: Any = field(default_factory=DatasetConfig)
    """`DatasetConfig`, `FinetuningDatasetConfig`, or an object of your own: see `trainer.data`."""

    peft: Any = None
    """None trains every parameter; `trainer.peft.LoRA`, `DoRA`, or a method of your own trains what it adds."""

    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    ddp: DistributedDataParallelConfig = field(default_factory=DistributedDataParallelConfig)
    dist: DistConfig = field(default_factory=DistConfig)
    rng: RNGConfig = field(default_factory=RNGConfig)
    mixed_precision: str = "bf16_mixed"
    """A name from `trainer.settings.precision`, or `fp32`."""

    comm_overlap: CommOverlapConfig = field(default_factory=CommOverlapConfig)
    profiling: ProfilingConfig = field(default_factory=ProfilingConfig)
    diagnostics: DiagnosticsConfig = field(default_factory=DiagnosticsConfig)
