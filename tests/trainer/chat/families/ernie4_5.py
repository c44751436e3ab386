"""ERNIE 4.5: the generation prompt ends with a space, which becomes part of an answer's first token unless the two are tokenized
separately."""

from tests.trainer.chat.family import SYSTEM, TURNS, Case, Family, said

FAMILY = Family(
    special=("<s>", "</s>", "<|begin_of_sentence|>", "<|end_of_sentence|>"),
    bos="<s>",
    eos="</s>",
    pieces="spaces",
    names={"cls_token": "<|begin_of_sentence|>", "sep_token": "<|end_of_sentence|>"},
)
FIRST = "<|begin_of_sentence|>Be quick.\nUser: What is it?\nAssistant: "
SEPARATELY = (
    "with this chat template an answer changes the tokens before it: message {}\n\n"
    "hint: learn each answer in an example of its own, where prompt and answer are tokenized separately"
)
EACH = (
    FIRST + "⟦A fox.<|end_of_sentence|>⟧",
    FIRST + "A fox.<|end_of_sentence|>User: And now?\nAssistant: ⟦It sleeps.<|end_of_sentence|>⟧",
)
CASES = {
    "each answer": Case(said(SYSTEM, *TURNS), EACH, learn="each_answer"),
    "last answer": Case(said(SYSTEM, *TURNS), EACH[1:], learn="last_answer"),
    "all answers": Case(said(SYSTEM, *TURNS), refused=SEPARATELY.format(3)),
}
