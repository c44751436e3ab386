"""Examples to learn answers from."""
