"""Run `mbtrain` as `python -m trainer`; torchrun starts it as `torchrun … -m trainer pretrain …`."""

from mbtools import mbtrain

if __name__ == "__main__":  # processes that write checkpoints import this file again
    mbtrain()
