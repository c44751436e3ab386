"""Fine-tuning data: conversations, or prompts and completions, from files to packed sequences with a loss mask."""
