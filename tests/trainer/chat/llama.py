"""A small tokenizer with Llama 3's special tokens, and chat templates for it."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SPECIAL = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|im_start|>",
    "<|im_end|>",
]
BEGIN, END, HEAD, HEAD_END, EOT, IM_START, IM_END = range(len(SPECIAL))

MARKED = (
    "{{ bos_token }}{% for message in messages %}"
    "<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|eot_id|>{% endgeneration %}"
    "{% else %}{{ message.content }}<|eot_id|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
PLAIN = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

TEXTS = [
    "the quick brown fox jumps over the lazy dog",
    "user\n\nassistant\n\nsystem\n\n",
    "what is it? it is  a\n\n\nfox, 12345!",
]
WORDS = Regex(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Llama 3 cuts text into words: white space goes with what follows it or with line ends, so that boundaries matter."""


def save(folder: Path, *, template: str | None = PLAIN, trim_offsets: bool = False) -> Path:
    """A folder with the tokenizer, as a Hugging Face directory has it."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(WORDS, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=360, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(TEXTS * 5, trainer)
    begin = processors.TemplateProcessing(single=f"{SPECIAL[0]} $A", special_tokens=[(SPECIAL[0], BEGIN)])
    made.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=trim_offsets), begin])
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    names = {"bos_token": SPECIAL[BEGIN], "eos_token": SPECIAL[END]}
    given = {} if template is None else {"chat_template": template}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **names, **given}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def said(*texts: str, system: str | None = None) -> list[dict[str, str]]:
    """User and assistant in turns."""
    turns = [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)]
    return [*([{"role": "system", "content": system}] if system is not None else []), *turns]
