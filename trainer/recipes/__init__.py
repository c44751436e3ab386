"""One file per model family; this directory is the registry of recipes."""
