"""Train language models with megatron-core: from scratch, from a Hugging Face directory, or from a Megatron checkpoint."""
