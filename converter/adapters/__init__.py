"""Adapters between Megatron and Hugging Face PEFT, and merged into the weights they were trained beside."""
