"""OLMo 2: the roles are plain text, and the one special token begins the conversation and ends the answers."""

from tests.trainer.chat.family import SYSTEM, TURNS, Case, Family, said

FAMILY = Family(special=("<|endoftext|>",), bos="<|endoftext|>", eos="<|endoftext|>")
FIRST = "<|endoftext|><|system|>\nBe quick.\n<|user|>\nWhat is it?\n<|assistant|>\n"
LATER = "\n<|user|>\nAnd now?\n<|assistant|>\n⟦It sleeps.<|endoftext|>⟧"
CASES = {
    "two turns": Case(said(SYSTEM, *TURNS), (FIRST + "⟦A fox.<|endoftext|>⟧" + LATER,)),
    "each answer": Case(
        said(SYSTEM, *TURNS),
        (FIRST + "⟦A fox.<|endoftext|>⟧", FIRST + "A fox.<|endoftext|>" + LATER),
        learn="each_answer",
    ),
}
