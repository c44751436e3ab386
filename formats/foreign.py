"""Formats of weights that are not supported: the file names that identify them, and how to convert a model from them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from formats.errors import UserError
from formats.folder import Folder

UNFINISHED = re.compile(
    r".+\.(incomplete|aria2|part|crdownload|partial|download|opdownload|filepart|tmp|temp|!ut)$", re.IGNORECASE
)
"""Names that programs give to files whose download is incomplete."""

_SAVE_AGAIN = (
    'load it with transformers and save it again, which writes safetensors: `AutoModelForCausalLM.from_pretrained("{folder}", '
    'dtype="auto").save_pretrained("OUT")`; then convert `OUT`'
)
_SAVE_IN_ITS_PROGRAM = (
    "load it with the program that saved it, and save the model with `save_pretrained`, which writes safetensors"
)  # fmt: skip
_VERL = (
    "`python -m verl.model_merger merge --backend fsdp --local_dir {folder} --target_dir OUT` writes safetensors; then "
    "convert `OUT`"
)
_DEEPSPEED = (
    "beside its `global_step*` folders DeepSpeed puts `zero_to_fp32.py`; there, `python zero_to_fp32.py . OUT "
    "--safe_serialization` writes safetensors; add the model's `config.json` and convert `OUT`"
)
_UNIVERSAL = (
    f"convert the checkpoint that it was made from: {_DEEPSPEED}; where that is gone, load this one in DeepSpeed "
    "(`load_universal` in the `checkpoint` of its config) and save it there"
)
_DEEPSPEED_FILES = r"mp_rank_\d+_model_states\.pt|zero_to_fp32\.py|global_step\d+/|layer_\d+-model_\d+-model_states\.pt"
_META = (
    "use the repository that has the model for transformers (with `-hf` in its name, or `*.safetensors` beside `original/`), "
    "or convert it with `convert_llama_weights_to_hf.py` of transformers 4"
)
_ALL_RANKS = "give the checkpoint's root, or its iteration (`iter_*` or `release`), which has a folder for each rank"
_FRAMEWORKS = (
    "load it with transformers 4 (`from_tf=True` or `from_flax=True`) and save it with `save_pretrained`; or fetch the "
    "repository's safetensors files"
)
_ORIGINAL = "convert the original weights, from which it was made"
_GGUF = (
    f"{_ORIGINAL}; or, with its rounding, "
    '`AutoModelForCausalLM.from_pretrained("{folder}", gguf_file="{file}").save_pretrained("OUT")`'
)


class Foreign(NamedTuple):
    """A format, known by the name of one file or folder in it. `{folder}` and `{file}` in the hint are filled in."""

    pattern: str
    what: str
    hint: str

    def matches(self, name: str) -> bool:
        return re.fullmatch(self.pattern, name, re.IGNORECASE) is not None


FORMATS = (
    Foreign(r"model_optim_rng\.pt|distrib_optim\.pt", "the state of one rank of a Megatron-LM checkpoint", _ALL_RANKS),
    Foreign(r"model_world_size_\d+_rank_\d+\.pt", "FSDP shards as verl saves them", _VERL),
    Foreign(r"latest_universal|global_step\d+_universal/|zero/", "a universal checkpoint of DeepSpeed", _UNIVERSAL),
    Foreign(r"(.+/)?zero_pp_rank_\d+_mp_rank_\d+_model_states\.pt", "a DeepSpeed checkpoint of ZeRO stage 3", _DEEPSPEED),
    Foreign(
        r"(.+/)?(\w+_)?zero_pp_rank_\d+_mp_rank_\d+_optim_states\.pt", "a DeepSpeed checkpoint of ZeRO stage 1 or 2", _DEEPSPEED
    ),
    Foreign(_DEEPSPEED_FILES, "a DeepSpeed checkpoint", _DEEPSPEED),
    Foreign(
        r"(diffusion_)?(pytorch_)?model(\.[\w-]+)?(-\d+-of-\d+)?\.bin(\.index(\.[\w-]+)?\.json)?",
        "pickled PyTorch tensors, not safetensors",
        _SAVE_AGAIN,
    ),
    Foreign(r"consolidated[\w.-]*\.pth", "Meta's own format (`.pth`)", _META),
    Foreign(r".*\.(gguf|ggml|llamafile)", "GGUF, the format of llama.cpp", _GGUF),
    Foreign(r".*\.nemo", "a NeMo archive", "give the archive itself: `{folder}/{file}`"),
    Foreign(r".*\.(h5|keras|pb)|.*\.h5\.index\.json|.*\.ckpt\.(index|meta|data-.*)", "TensorFlow weights", _FRAMEWORKS),
    Foreign(r".*\.msgpack(\.index\.json)?|_CHECKPOINT_METADATA|manifest\.ocdbt", "Flax or JAX weights", _FRAMEWORKS),
    Foreign(r".*\.(onnx|onnx_data(_\d+)?|onnx\.data)", "an ONNX graph", _ORIGINAL),
    Foreign(r".*\.(mlmodel|mlpackage|mlmodelc)/?", "a CoreML model", _ORIGINAL),
    Foreign(r".*\.npz", "numpy arrays, as MLX saves them", _ORIGINAL),
    Foreign(r".*\.(tflite|task|litertlm)", "a TFLite model", _ORIGINAL),
    Foreign(r"openvino_.*|.*\.(engine|plan|trt|mlc)", "a model compiled for one engine", _ORIGINAL),
    Foreign(r".*\.ot", "weights for Rust (`rust_model.ot`)", _ORIGINAL),
    Foreign(
        r"model_index\.json",
        "a pipeline of diffusers, of several models",
        "none of them is a language model of a supported family",
    ),
    Foreign(
        r"(.*[_-])?(rank|shard)[_-]?\d+.*\.(pt|pth|bin)",
        "pickled PyTorch tensors, one file for each rank",
        f"gather them: {_SAVE_IN_ITS_PROGRAM}",
    ),
    Foreign(r".*\.(pt|pth|ckpt|bin|pkl|pickle)", "pickled PyTorch tensors, not safetensors", _SAVE_IN_ITS_PROGRAM),
)
"""Formats that are named and refused. The first that a name identifies counts."""

_NOT_WEIGHTS = re.compile(
    r"(optimizer|scheduler|rng_state.*|training_args|scaler|random_states.*|trainer_state)\.(pt|pth|bin|pkl|json)|tokenizer.*|vocab.*"
)
"""Files that accompany weights of every format, and identify none."""


def find(names: Iterable[str]) -> tuple[Foreign, str] | None:
    """Return the first format that one of these names identifies, and that name."""
    named = sorted(name for name in names if not _NOT_WEIGHTS.fullmatch(name))
    return next(((known, name) for known in FORMATS for name in named if known.matches(name)), None)


def refuse(label: str, names: Iterable[str]) -> None:
    """Raise UserError if one of the names in the folder `label` identifies an unsupported format."""
    known = find(names)
    if known:
        other, name = known
        raise UserError(f"`{label}` has its weights in `{name}`: {other.what}", hint=hint(other, label, name))


def hint(known: Foreign, label: str, name: str) -> str:
    """Return what to do about a file of that format in the folder `label`."""
    return known.hint.replace("{file}", name.rstrip("/")).replace("{folder}", label)


_DOWNLOADS = ".cache/huggingface/download"


def unfinished_downloads(folder: Folder, names: Sequence[str]) -> list[str]:
    """Return the files of a folder with these `names` whose download is incomplete."""
    unfinished = [name for name in names if UNFINISHED.fullmatch(name.rstrip("/"))]
    inside = folder.below(_DOWNLOADS).children() if ".cache/" in names else []
    return unfinished + [f"{_DOWNLOADS}/{name}" for name in inside if UNFINISHED.fullmatch(name)]
