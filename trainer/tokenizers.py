"""Convert text to token ids and back, with the tokenizer of a Hugging Face folder, or with plain bytes.

Knows where such folders name the end-of-document token. Knows neither models nor data files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from formats.errors import UserError, format_untrusted
from formats.faults import fault
from formats.home import expanded
from formats.json_objects import parse_json

END = "<|endoftext|>"
_BYTE_END = 256

SIDE_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "merges.txt", "vocab.txt", "chat_template.jinja", "chat_template.json", "config.json", "generation_config.json",
)  # fmt: skip
MODEL_CONFIGS = ("generation_config.json", "config.json")
ANY_TOKENIZER = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tokenizer_config.json")


class Encoded(Protocol):
    """An encoding of the `tokenizers` library."""

    ids: list[int]
    offsets: list[tuple[int, int]]
    """For each token its characters in the text, as [start, end)."""


@dataclass(frozen=True, slots=True, weakref_slot=True, kw_only=True)
class Tokenizer:
    """A loaded tokenizer."""

    encode: Callable[[str], list[int]]
    """Return the token ids of a text, without tokens for its begin or end."""

    decode: Callable[[Sequence[int]], str]
    """Return the text, special tokens included; unknown ids are left out."""

    eod: int
    """The token that ends a document."""

    vocab_size: int
    """One more than the greatest token number."""

    files: Callable[[], Mapping[str, bytes]]
    """Return the files from which `load` makes this tokenizer again, by name."""

    begin: tuple[int, ...] = ()
    """The tokens that transformers puts before every text; `encode` leaves them out."""

    name: str = ""
    """The argument of `load`."""

    encode_batch: Callable[[Sequence[str]], list[Encoded]] | None = None
    """Encode many texts on all cores, with each token's offsets in its text; None where the library gives no offsets."""

    def save(self, folder: Path) -> None:
        """Write the files, so that `load(folder)` gives the same tokenizer; transformers reads them as well."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.files().items():
            (folder / name).write_bytes(content)


def of_run(name: str | None, *, beside: str | None) -> Tokenizer | None:
    """Load the named tokenizer, or the one in the model's folder `beside`; None where there is none."""
    if name is None and beside and (Path(beside) / "tokenizer.json").is_file():
        name = beside
    return load(name) if name else None


def load(name: str) -> Tokenizer:
    """Load a tokenizer from a folder, or `byte` for plain bytes.

    Raises UserError where the folder has none, or names no token that ends a document.
    """
    if name == "byte":
        return _bytes()
    name = expanded(name)
    folder = Path(name)
    if not folder.is_dir():
        raise UserError(f"`{name}` is not a folder", hint="give a folder with `tokenizer.json`, or `byte` for plain bytes")
    if (folder / "tokenizer.json").is_file():
        return _fast(folder, _from_file(folder / "tokenizer.json"))
    return _by_transformers(folder)


def _bytes() -> Tokenizer:
    return Tokenizer(
        encode=lambda text: list(text.encode()),
        decode=_text_of_bytes,
        eod=_BYTE_END,
        vocab_size=_BYTE_END + 1,
        files=_byte_files,
        name="byte",
    )


def _text_of_bytes(ids: Sequence[int]) -> str:
    parts = (bytes((number,)) if number < _BYTE_END else END.encode() for number in ids if number <= _BYTE_END)
    return b"".join(parts).decode(errors="replace")


def _byte_files() -> dict[str, bytes]:
    """Return the byte tokenizer as a byte-level BPE without merges, which other programs can load."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers  # noqa: PLC0415 - slow to import
    from transformers.convert_slow_tokenizer import bytes_to_unicode  # noqa: PLC0415

    vocabulary = {letter: byte for byte, letter in bytes_to_unicode().items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END, special=True, normalized=False)])
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "clean_up_tokenization_spaces": False}
    return {
        "tokenizer.json": tokenizer.to_str(pretty=True).encode(),
        "tokenizer_config.json": json.dumps(config, indent=2).encode(),
    }


def _from_file(path: Path) -> Any:
    from tokenizers import Tokenizer  # noqa: PLC0415 - slow to import

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"`{path}` is not readable as a tokenizer", hint="fetch the file again") from error


def _fast(folder: Path, backend: Any) -> Tokenizer:
    """Return a tokenizer of the `tokenizers` library, with its truncation and padding, which are for batches, switched off."""
    from tokenizers import processors  # noqa: PLC0415 - slow to import

    backend.no_truncation()
    backend.no_padding()
    begin = _prefix(*(backend.encode(_ANY_TEXT, add_special_tokens=special).ids for special in (True, False)))
    backend.post_processor = processors.Sequence([])  # it would leave white space out of the offsets
    return Tokenizer(
        encode=lambda text: backend.encode(text, add_special_tokens=False).ids,
        decode=lambda ids: backend.decode(list(ids), skip_special_tokens=False),
        eod=_end_of_document(folder, backend.token_to_id),
        vocab_size=max(backend.get_vocab(with_added_tokens=True).values()) + 1,
        files=lambda: _side_files(folder),
        begin=begin,
        name=str(folder),
        encode_batch=lambda texts: backend.encode_batch(list(texts), add_special_tokens=False),
    )


_ANY_TEXT = "a"


def _prefix(ids: list[int], text_ids: list[int]) -> tuple[int, ...]:
    """Return the tokens of `whole` before `text`."""
    starts = (start for start in range(len(ids)) if ids[start : start + len(text_ids)] == text_ids)
    return tuple(ids[: next(starts, 0)])


def _by_transformers(folder: Path) -> Tokenizer:
    """Load a tokenizer that only transformers can read. No code from the folder is run."""
    if not any((folder / name).is_file() for name in ANY_TOKENIZER):
        raise UserError(
            f"`{folder}` has no tokenizer: there is no `tokenizer.json`",
            hint="point at a Hugging Face model directory, or `byte`",
        )
    from transformers import AutoTokenizer  # noqa: PLC0415 - slow to import

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # any of many kinds, from several libraries
        raise unreadable(f"`{folder}` has no `tokenizer.json`, and transformers cannot read the rest", folder, error) from error
    if tokenizer.is_fast:
        return _fast(folder, tokenizer.backend_tokenizer)
    numbers = tokenizer.get_vocab()
    return Tokenizer(
        encode=lambda text: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"],
        decode=lambda ids: tokenizer.decode(list(ids), skip_special_tokens=False),
        eod=_end_of_document(folder, numbers.get),
        vocab_size=max(numbers.values()) + 1,
        files=lambda: _side_files(folder),
        begin=_prefix(*(tokenizer(_ANY_TEXT, add_special_tokens=special)["input_ids"] for special in (True, False))),
        name=str(folder),
    )


def unreadable(message: str, folder: Path, error: Exception) -> UserError:
    """Return the error for a folder whose tokenizer transformers cannot read. It starts with `message`, and names the missing
    packages that the folder's files need; transformers often names another package, which it tries last."""
    for file, kind, packages in _needed(folder):
        missing = [name for name, module in packages.items() if not _installed(module)]
        if missing:
            return UserError(
                f"{message}: `{file}` is a {kind} model, and {_names_of(missing)} not installed",
                hint=f"pip install {' '.join(missing)}",
            )
    if isinstance(error, ImportError):
        return UserError(f"{message}: {fault(error)}", hint="install that package")
    return UserError(
        f"{message} ({fault(error)})",
        hint="save the tokenizer with transformers' `save_pretrained`, which writes `tokenizer.json`, or fetch its files again",
    )


_SENTENCEPIECE = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}
_TIKTOKEN = {"tiktoken": "tiktoken", "blobfile": "blobfile"}


def _needed(folder: Path) -> Iterator[tuple[str, str, Mapping[str, str]]]:
    """Yield the model files of a folder, the library they belong to, and the packages that read them, with a module of each.

    tiktoken's files are lines of base64 and a number, sentencepiece's are a protobuf message.
    """
    for path in sorted({*folder.glob("*.model"), *folder.glob("*.tiktoken")}):
        head = path.read_bytes()[:4096] if path.is_file() else b""
        lines = head.splitlines()[:-1]
        text = bool(lines) and all(re.fullmatch(rb"[A-Za-z0-9+/]+=* \d+", line) for line in lines)
        yield (path.name, "tiktoken", _TIKTOKEN) if text else (path.name, "SentencePiece", _SENTENCEPIECE)


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of the module's package
        return False


def _names_of(packages: Sequence[str]) -> str:
    """Return `the package x is` or `the packages x and y are`."""
    listed = " and ".join(f"`{name}`" for name in packages)
    return f"the package {listed} is" if len(packages) == 1 else f"the packages {listed} are"


def _side_files(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in SIDE_FILES if (folder / name).is_file()}


def _end_of_document(folder: Path, number_of: Callable[[str], int | None]) -> int:
    """Return the id of the token that ends a sequence, from the first file of the folder that names one."""
    for source, value in _eos_entries(folder):
        number = number_of(value) if isinstance(value, str) else value
        if not isinstance(number, int) or isinstance(number, bool) or number < 0:
            raise UserError(
                f"`{folder / source}` names `{format_untrusted(value)}` as its end-of-document token, which the "
                "tokenizer does not have",
                hint="correct `eos_token`, or the tokenizer",
            )
        return number
    raise UserError(
        f"`{folder}` names no end-of-document token",
        hint="set `eos_token` in `tokenizer_config.json`, or `eos_token_id` in `generation_config.json` or `config.json`",
    )


def end_tokens(tokenizer: Tokenizer) -> frozenset[int]:
    """Return the tokens at which generation stops: the tokenizer's end-of-document token, and the `eos_token_id` of the model's
    config files, such as the end of a turn."""
    eos = read_model_config(tokenizer, MODEL_CONFIGS[0]).get("eos_token_id")
    return frozenset((tokenizer.eod, *(eos if isinstance(eos, list) else [] if eos is None else [eos])))


def read_model_config(tokenizer: Tokenizer, name: str) -> dict[str, Any]:
    """Return a config file of the model from the tokenizer's folder; empty if there is none."""
    data = tokenizer.files().get(name)
    return parse_json(data, source=name) if data else {}


def _eos_entries(folder: Path) -> Iterator[tuple[str, Any]]:
    keys = (("tokenizer_config.json", "eos_token"), ("generation_config.json", "eos_token_id"), ("config.json", "eos_token_id"))
    for name, key in keys:
        path = folder / name
        value = parse_json(path.read_bytes(), source=str(path)).get(key) if path.is_file() else None
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, list):  # several tokens may end a turn; the first one ends a text
            value = value[0] if value else None
        if value is not None:
            yield name, value
