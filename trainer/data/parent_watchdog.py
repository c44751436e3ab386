"""Worker processes end with the process that started them, however that ended."""

from __future__ import annotations

import multiprocessing
import os
import threading


def end_with_parent() -> None:
    """End this process as soon as its parent is gone: by a thread that waits for it.

    Neither a pool's processes nor those of a fork server notice that their parent was killed; they would wait for work forever.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
