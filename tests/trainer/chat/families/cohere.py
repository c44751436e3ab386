"""Command R: several templates, of which the one named `tool_use` is taken for examples with tools."""

from tests.trainer.chat.family import SYSTEM, TOOLS, TURNS, Case, Family, call, said

FAMILY = Family(
    special=("<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>",
             "<|CHATBOT_TOKEN|>"),
    bos="<BOS_TOKEN>", eos="<|END_OF_TURN_TOKEN|>", begins=True,
)  # fmt: skip
START, END = "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"
FIRST = f"<BOS_TOKEN>{START}<|SYSTEM_TOKEN|>Be quick.{END}{START}<|USER_TOKEN|>What is it?{END}{START}<|CHATBOT_TOKEN|>"
LATER = f"{START}<|USER_TOKEN|>And now?{END}{START}<|CHATBOT_TOKEN|>⟦It sleeps.{END}⟧"
CASES = {
    "two turns": Case(said(SYSTEM, *TURNS), (f"{FIRST}⟦A fox.{END}⟧{LATER}",)),
    "each answer": Case(said(SYSTEM, *TURNS), (f"{FIRST}⟦A fox.{END}⟧", f"{FIRST}A fox.{END}{LATER}"), learn="each_answer"),
    "tools": Case(
        said(
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "tool_calls": [call("weather", city="Bern")]},
            {"role": "tool", "content": "rain"},
            {"role": "assistant", "content": "It rains."},
            tools=TOOLS,
        ),
        (
            (
                f"<BOS_TOKEN>{START}<|SYSTEM_TOKEN|>## Available Tools\n"
                f'[{{"type": "function", "function": {{"name": "weather"}}}}]'
                f"{END}{START}<|USER_TOKEN|>Weather?{END}{START}<|CHATBOT_TOKEN|>⟦Action:```json\n"
                f'[{{"tool_name": "weather", "parameters": {{"city": "Bern"}}}}]\n```{END}⟧'
                f"{START}<|SYSTEM_TOKEN|><results>\nrain</results>{END}{START}<|CHATBOT_TOKEN|>⟦It rains.{END}⟧"
            ),
        ),
    ),
}
