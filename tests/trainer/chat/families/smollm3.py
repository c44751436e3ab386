"""SmolLM3: generation marks, which include the generation prompt and a line end; neither is learned."""

from tests.trainer.chat.family import SYSTEM, TOOLS, TURNS, Case, Family, call, said

FAMILY = Family(
    special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"), added=("<think>", "</think>"), eos="<|im_end|>", begins=False
)
DATED = "<|im_start|>system\n## Metadata\n\nToday Date: 26 July 2024\nReasoning Mode: "
FIRST = (
    "/think\n\n## Custom Instructions\n\nBe quick.\n\n## Tools\n\n### XML Tools\n\nNone\n\n<|im_end|>\n"
    "<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"
)
LATER = "<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\n"
SHORT = {"chat_template_kwargs": {"enable_thinking": False}}
EMPTY = "<think>\n\n</think>\n"
CASES = {
    "two turns": Case(
        said(SYSTEM, *TURNS), (DATED + FIRST + "⟦A fox.<|im_end|>⟧\n" + LATER + "⟦It sleeps.<|im_end|>⟧\n",)
    ),
    "each answer": Case(
        said(SYSTEM, *TURNS),
        (
            DATED + FIRST + "⟦A fox.<|im_end|>⟧\n",
            DATED + FIRST + "A fox.<|im_end|>\n" + LATER + "⟦It sleeps.<|im_end|>⟧\n",
        ),
        learn="each_answer",
    ),
    "thoughts in the text": Case(
        said(SYSTEM, TURNS[0], {"role": "assistant", "content": "<think>\nRed fur.\n</think>\nA fox."}),
        (DATED + FIRST + "⟦<think>\nRed fur.\n</think>\nA fox.<|im_end|>⟧\n",),
    ),
    "thinking switched off": Case(
        said(SYSTEM, *TURNS, **SHORT),
        (
            DATED + FIRST.replace("/think", "/no_think", 1) + EMPTY + "⟦A fox.<|im_end|>⟧\n"
            + LATER + EMPTY + "⟦It sleeps.<|im_end|>⟧\n",
        ),
    ),
    "thoughts beside the text": Case(
        said(TURNS[0], {**TURNS[1], "reasoning_content": "Red fur."}),
        refused="the chat template does not render all content: message 2, its `reasoning_content`",
    ),
    "calls": Case(
        said(TURNS[0], {**TURNS[1], "tool_calls": [call("weather", city="Bern")]}, tools=TOOLS),
        refused="the chat template does not render all content: message 2, its `tool_calls`",
    ),
}  # fmt: skip
