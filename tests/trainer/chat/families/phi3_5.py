"""Phi-3.5: `<|endoftext|>` closes a conversation after the `<|end|>` at which the model stops. Special tokens take the line end
after them, so that no token after an answer has it."""

from tests.trainer.chat.family import SYSTEM, TOOLS, TURNS, Case, Family, said

FAMILY = Family(
    special=("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), eos="<|endoftext|>", pieces="prefixed"
)
FIRST = "<|system|>\nBe quick.<|end|>\n<|user|>\nWhat is it?<|end|>\n<|assistant|>\n"
LATER = "<|user|>\nAnd now?<|end|>\n<|assistant|>\n⟦It sleeps.<|end|>⟧<|endoftext|>"
CASES = {
    "two turns": Case(said(SYSTEM, *TURNS), (FIRST + "⟦A fox.<|end|>⟧" + LATER,)),
    "each answer": Case(
        said(SYSTEM, *TURNS),
        (FIRST + "⟦A fox.<|end|>⟧<|endoftext|>", FIRST + "A fox.<|end|>" + LATER),
        learn="each_answer",
    ),
    "a question last": Case(
        said(*TURNS[:3]),
        ("<|user|>\nWhat is it?<|end|>\n<|assistant|>\n⟦A fox.<|end|>⟧<|user|>\nAnd now?<|end|>\n<|endoftext|>",),
    ),
    "tools": Case(said(*TURNS, tools=TOOLS), refused="the chat template does not render all content: its `tools`"),
}
