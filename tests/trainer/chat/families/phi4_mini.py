"""Phi-4-mini: closes conversations as Phi-3.5 does; tools are a text in the system message."""

from tests.trainer.chat.family import ANSWERED, ASKED, SYSTEM, TOOLS, TURNS, Case, Family, said

FAMILY = Family(
    special=("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|tool|>", "<|/tool|>"), eos="<|endoftext|>"
)
FIRST = "<|system|>Be quick.<|end|><|user|>What is it?<|end|><|assistant|>"
LATER = "<|user|>And now?<|end|><|assistant|>⟦It sleeps.<|end|>⟧<|endoftext|>"
CASES = {
    "two turns": Case(said(SYSTEM, *TURNS), (FIRST + "⟦A fox.<|end|>⟧" + LATER,)),
    "each answer": Case(
        said(SYSTEM, *TURNS),
        (FIRST + "⟦A fox.<|end|>⟧<|endoftext|>", FIRST + "A fox.<|end|>" + LATER),
        learn="each_answer",
    ),
    "tools in the system message": Case(
        said({**SYSTEM, "tools": '[{"name": "weather"}]'}, ASKED, ANSWERED),
        (
            (
                '<|system|>Be quick.<|tool|>[{"name": "weather"}]<|/tool|><|end|><|user|>What is it?<|end|><|assistant|>'
                "⟦A fox.<|end|>⟧<|endoftext|>"
            ),
        ),
    ),
    "tools": Case(said(SYSTEM, *TURNS, tools=TOOLS), refused="the chat template does not render all content: its `tools`"),
}
