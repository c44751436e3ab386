"""A process that reads mock data with two workers, prints their numbers, and waits to be killed."""

from __future__ import annotations

import multiprocessing
import signal

from trainer.data.loader import batches
from trainer.data.mock import Mock

if __name__ == "__main__":
    data = Mock(samples=1000, sequence_length=8, vocab_size=100, seed=0, split=0)
    reading = batches(data, consumed=0, micro_batch_size=1, global_batch_size=1, rank=0, size=1, num_workers=2)
    next(reading)
    print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
    signal.pause()
