"""One command per file; `trainer.cli` lists this directory."""
