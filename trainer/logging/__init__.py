"""The log of a run: console lines, `metrics.jsonl`, TensorBoard, Weights & Biases, and its start-up summary."""
