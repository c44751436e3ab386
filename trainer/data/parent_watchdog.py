"""End worker processes when the process that started them ends, even if it was killed."""

from __future__ import annotations

import multiprocessing
import os
import threading


def end_with_parent() -> None:
    """Start a thread that ends this process as soon as its parent is gone.

    Neither the processes of a pool nor those of a fork server notice that their parent was killed: they would wait for work
    forever.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
