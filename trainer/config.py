"""Everything a run can be told, as dataclasses under the field names that Megatron's users know.

Knows no defaults that depend on a model or a machine: recipes know the first, `resolve` finds the second.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from megatron.core import distributed
from megatron.core.optimizer import OptimizerConfig

FilePath = Annotated[str, "a path"]
"""A file or a folder; a `~` that it begins with is the home directory (`trainer.settings.paths`)."""

Blend = list[Any]
"""Prefixes of files, or weights and prefixes in turns."""


@dataclass(kw_only=True)
class DistributedDataParallelConfig(distributed.DistributedDataParallelConfig):
    """megatron-core's, with room for the precision to choose."""

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
    """Save and stop after so many minutes."""

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
    """JSON lines, parquet, a folder of Hugging Face `datasets`, or a folder that `mbtrain pack` made."""

    validation_path: FilePath | None = None
    test_path: FilePath | None = None
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

    skip_bad: bool = False
    """Count examples that cannot be used, instead of stopping at the first."""

    random_seed: int = 1234
    path_to_cache: FilePath | None = None
    """Where tokens are kept from one start to the next; None for a folder beside the data."""

    num_workers: int = 2
    """Processes that read ahead, per rank; 0 reads in the training process."""

    def build(self, tokenizer: Any, vocab_size: int, samples: tuple[int, int, int]) -> Any:
        """See `trainer.data`."""
        from trainer.data import chat  # noqa: PLC0415 - brings torch

        return chat.build(self, tokenizer=tokenizer, vocab_size=vocab_size, samples=samples)


@dataclass(kw_only=True)
class TokenizerConfig:
    """What made the tokens: needed for end-of-document ids, generation, and to travel with checkpoints."""

    tokenizer_model: FilePath | None = None
    """A folder with `tokenizer.json`, or `byte`; None for the model's own, where it has one."""


@dataclass(kw_only=True)
class LoggerConfig:
    """What is told of a run, and where."""

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
    """What a run starts from, and what it leaves."""

    save: FilePath | None = None
    """The folder that checkpoints go to; None for none."""

    load: FilePath | None = None
    """A folder of this trainer's checkpoints to resume from: weights, optimizer, data position. One without checkpoints
    starts anew, so that `load` and `save` may be the same from the first start on."""

    pretrained_checkpoint: FilePath | None = None
    """Weights to start from where there is nothing to resume: a Megatron checkpoint or a Hugging Face directory."""

    random_weights: bool = False
    """Fine-tune random weights, as benchmarks do; otherwise naming none is an error. Pretraining needs no leave."""

    pretrained_adapter: FilePath | None = None
    """Adapters to start from beside those weights: a checkpoint of this trainer, or of `mbconvert adapter-to-mcore`."""

    save_interval: int | None = None
    """Steps between checkpoints; the last step always saves."""

    save_interval_in_mins: float | None = None
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


@dataclass(kw_only=True)
class CommOverlapConfig:
    """What is sent while something else is computed; None lets `overlap` choose."""

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
