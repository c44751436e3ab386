"""Chat templates of published families, with their special tokens, a tokenizer trained on the spot, and cases by hand."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from tests.trainer.chat.llama import WORDS

FOLDER = Path(__file__).parent / "families"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")

ASKED = {"role": "user", "content": "What is it?"}
ANSWERED = {"role": "assistant", "content": "A fox."}
TURNS = [ASKED, ANSWERED, {"role": "user", "content": "And now?"}, {"role": "assistant", "content": "It sleeps."}]
SYSTEM = {"role": "system", "content": "Be quick."}
TOOLS = [{"type": "function", "function": {"name": "weather"}}]

_TEXTS = [
    "What is it? A fox. And now? It sleeps. Be quick. The weather is rain, it rains in Bern and sun in Rome.",
    '{"type": "function", "function": {"name": "weather", "arguments": {"city": "Bern"}}}',
    "system\n user\n assistant\n model\n tool\n\n",
]


@dataclass(frozen=True)
class Case:
    """An example, and what is expected of it."""

    example: dict
    expected: tuple[str, ...] = ()
    """The text of each example made of it, in which what is learned is in ⟦brackets⟧."""

    learn: str = "all_answers"
    refused: str = ""
    """How the refusal begins, where it is refused."""


@dataclass(frozen=True)
class Family:
    """What a family's tokenizer has beside the template."""

    special: tuple[str, ...]
    """Special tokens."""

    eos: str
    bos: str | None = None
    added: tuple[str, ...] = ()
    """Tokens that are added, and not special."""

    stops: tuple[str, ...] = ()
    """The tokens of `eos_token_id` in `generation_config.json`."""

    pieces: str = "bytes"
    """`bytes` as GPT's, `spaces` as SentencePiece's, `prefixed` as Llama 2's: SentencePiece's with a space after special tokens,
    which take the white space after them."""

    begins: bool = False
    """Whether the tokenizer puts `bos` before every text."""

    openai_calls: bool = False
    """Whether the template takes tool calls as OpenAI's API has them: a null content, and arguments as JSON texts."""

    names: dict[str, str] = field(default_factory=dict)
    """Further entries of `tokenizer_config.json`."""


def said(*messages: dict, **further: object) -> dict:
    """Return an example."""
    return {"messages": list(messages), **further}


def call(name: str, *, identity: str = "", **arguments: str) -> dict:
    """Return a tool call."""
    function = {"name": name, "arguments": arguments}
    return {"type": "function", "function": function, **({"id": identity} if identity else {})}


def load(name: str) -> tuple[Family, dict[str, Case]]:
    """Return a family and its cases by name."""
    module = import_module(f"tests.trainer.chat.families.{name}")
    return module.FAMILY, module.CASES


def save(folder: Path, name: str, family: Family) -> Path:
    """Write the family's tokenizer and template as a Hugging Face folder, and return the folder."""
    made = Tokenizer.from_str(_trained(family.pieces))
    absorbs = family.pieces == "prefixed"
    made.add_special_tokens([AddedToken(text, special=True, normalized=False, rstrip=absorbs) for text in family.special])
    made.add_tokens([AddedToken(text, special=False, normalized=False) for text in family.added])
    if family.begins:
        pair = (family.bos, made.token_to_id(family.bos))
        made.post_processor = processors.TemplateProcessing(single=f"{family.bos} $A", special_tokens=[pair])
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, "eos_token": family.eos}
    config |= {"bos_token": family.bos} if family.bos else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | family.names | {"chat_template": _templates(name)}))
    if family.stops:
        stops = {"eos_token_id": [made.token_to_id(text) for text in family.stops]}
        (folder / "generation_config.json").write_text(json.dumps(stops))
    return folder


def _templates(name: str) -> str | list[dict[str, str]]:
    """Return the template, or all of them where there are several, as `tokenizer_config.json` lists them."""
    default = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    others = [{"name": path.stem.split(".")[1], "template": path.read_text()} for path in FOLDER.glob(f"{name}.*.jinja")]
    return [{"name": "default", "template": default}, *others] if others else default


@cache
def _trained(pieces: str) -> str:
    if pieces == "bytes":
        made = Tokenizer(models.BPE())
        bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(WORDS, "isolated"), bytes_])
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        lines = pre_tokenizers.Split(Regex("\n+"), "isolated")
        made.pre_tokenizer = pre_tokenizers.Sequence([lines, pre_tokenizers.Split("▁", "merged_with_next")])
        prefix = [normalizers.Prepend("▁")] if pieces == "prefixed" else []
        made.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
        made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        alphabet = [chr(code) for code in range(32, 127)] + ["\n", "▁"]
    unknown = [] if pieces == "bytes" else ["<unk>"]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=unknown, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(_TEXTS * 5, trainer)
    return made.to_str()


def split_learned(text: str) -> list[tuple[str, bool]]:
    """Return the pieces of an expected text, and whether each is learned."""
    return [(piece, bool(number % 2)) for number, piece in enumerate(re.split("[⟦⟧]", text)) if piece]
