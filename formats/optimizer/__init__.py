"""The optimizer state of Megatron checkpoints, of every kind, in the names and shapes of the weights.

`state.py` says what there is of it, `open.py` chooses how it is read, and each other module reads the kinds of its name.
"""
