"""Training few parameters beside a model whose own stay as they are."""
