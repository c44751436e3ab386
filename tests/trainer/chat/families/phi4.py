"""Phi-4: ChatML with a token between the role and the text."""

from tests.trainer.chat.family import SYSTEM, TURNS, Case, Family, said

FAMILY = Family(special=("<|endoftext|>", "<|im_start|>", "<|im_sep|>", "<|im_end|>"), eos="<|im_end|>")
FIRST = (
    "<|im_start|>system<|im_sep|>Be quick.<|im_end|><|im_start|>user<|im_sep|>What is it?<|im_end|>"
    "<|im_start|>assistant<|im_sep|>"
)
LATER = "<|im_start|>user<|im_sep|>And now?<|im_end|><|im_start|>assistant<|im_sep|>⟦It sleeps.<|im_end|>⟧"
CASES = {
    "two turns": Case(said(SYSTEM, *TURNS), (FIRST + "⟦A fox.<|im_end|>⟧" + LATER,)),
    "last answer": Case(said(SYSTEM, *TURNS), (FIRST + "A fox.<|im_end|>" + LATER,), learn="last_answer"),
}
