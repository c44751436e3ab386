"""`python -m trainer`, and what torchrun starts: `torchrun … -m trainer pretrain …`."""

from trainer.cli import main

if __name__ == "__main__":  # processes that write checkpoints import this file again
    main()
