"""What arrives in any order from several threads is handed on from first byte to last."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from formats.in_order import AbandonedError, InOrder
from formats.spec import Span

lengths = st.lists(st.tuples(st.booleans(), st.integers(1, 40)), min_size=1, max_size=12)


@given(lengths, st.lists(st.integers(0, 40), max_size=6), st.integers(0, 99))
def test_a_hash_of_pieces_from_threads_is_the_hash_of_the_file(parts, cuts, seed):
    whole = np.random.default_rng(seed).bytes(sum(length for _, length in parts))
    spans, at = [], 0
    for known, length in parts:
        spans.append(Span(at, whole[at : at + length]) if known else Span(at, None, length))
        at += length
    bounds = [sorted({s.start, s.stop, *(c for c in (s.start + x for x in cuts) if c < s.stop)}) for s in spans if s.size]
    pieces = [pair for bound in bounds for pair in pairwise(bound)]
    digests = {}
    streams = InOrder(lambda _: spans, lambda _: sha256(), lambda name, digest: digests.update({name: digest.digest()}))
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda piece: streams.put("file", piece[0], memoryview(whole)[slice(*piece)]), pieces))
    assert digests == ({"file": sha256(whole).digest()} if pieces else {})


def test_those_who_wait_for_what_will_not_come_are_woken():
    streams = InOrder(lambda _: [Span(0, None, 10)], lambda _: sha256(), lambda *_: None)
    waiting = threading.Event()

    def wait():
        waiting.set()
        with pytest.raises(AbandonedError):
            streams.put("file", 5, memoryview(b"later"))

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(wait)
        waiting.wait()
        streams.abandon()
        done.result(timeout=600)
