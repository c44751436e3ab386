"""Convert adapters between Megatron and Hugging Face PEFT, and merge them into the weights of their base model."""
