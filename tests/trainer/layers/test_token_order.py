"""Tokens that one rank keeps are not sorted a second time, and train the same."""

from __future__ import annotations

from pathlib import Path

from tests.trainer import small


def train(path, changes, sorted_again):
    """Run on this rank: losses, and how often tokens were sorted a second time."""
    from megatron.core.transformer.moe import token_dispatcher

    from trainer import layers
    from trainer.loop import pretrain

    sort, calls = token_dispatcher.sort_chunks_by_idxs, []
    token_dispatcher.sort_chunks_by_idxs = lambda *args, **options: [calls.append(1), sort(*args, **options)][1]
    if sorted_again:
        layers.MODEL_PIECES = tuple(piece for piece in layers.MODEL_PIECES if piece is not layers.sorted_once)
    history = small.History()
    pretrain(small.settings(Path(path), train__train_iters=5, **changes), callbacks=[history])
    return history.losses, len(calls)


def test_a_rank_alone_sorts_tokens_once(ranks, family_folder):
    path = str(family_folder("mixtral"))
    (once,), (again,) = (ranks.run(train, 1, path, {}, option) for option in (False, True))
    assert once[0] == again[0]
    assert once[1] == 0 < again[1]


def test_ranks_that_exchange_tokens_sort_what_came(ranks, family_folder):
    parallel = {"model__expert_model_parallel_size": 2}
    assert all(calls for _, calls in ranks.run(train, 2, str(family_folder("mixtral")), parallel, False))
