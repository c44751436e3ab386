"""Examples to learn answers from: from files of conversations, or of prompts and completions, to packed sequences."""
