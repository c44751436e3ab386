"""A model with adapters answers as the model that PEFT merges them into; held-out loss, and generation, without dropout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.trainer import small
from tests.trainer.peft.runs import ALPHA, DIM, LAYOUTS, ONE_STEP, Watched, by_peft

PROMPT = [5, 17, 3, 200, 9, 31]


class _Asked(Watched):
    """What would follow the prompt, once at its end and once a token later."""

    def on_end(self, run):
        from trainer.generation.forward import inference_mode, new_cache, next_logits

        cache = new_cache(len(PROMPT) + 1)
        with inference_mode(run.chunks):
            self.answers = [next_logits(run.chunks, tokens, cache) for tokens in (PROMPT, [7])]


def _answers(folder, changes, method, begin):
    from trainer import peft
    from trainer.loop import pretrain

    config = small.settings(Path(folder), **(ONE_STEP | changes))
    kind, more = method
    config.peft = getattr(peft, kind)(dim=DIM, alpha=ALPHA, canonical=True, **more)
    history = _Asked(begin)
    pretrain(config, callbacks=[history])
    return [None if logits is None else logits.numpy() for logits in history.answers], history.evaluations


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["LoRA", "DoRA"])
def test_what_follows_is_what_peft_merged_says(kind, layout, ranks, model_folder):
    folder = model_folder("gqa")
    model, begin = by_peft(folder, seed=7, zero_b=False, use_dora=kind == "DoRA")
    merged = model.merge_and_unload()
    with torch.no_grad():
        wanted = merged(torch.tensor([[*PROMPT, 7]])).logits[0, -2:]
    world, changes = LAYOUTS[layout]
    answers, _ = ranks.run(_answers, world, str(folder), changes, (kind, {"dropout": 0.5}), begin)[-1]
    torch.testing.assert_close(torch.from_numpy(answers[0]), wanted[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.from_numpy(answers[1]), wanted[1], rtol=1e-4, atol=1e-5)


def test_an_evaluation_drops_nothing(ranks, model_folder):
    _, begin = by_peft(model_folder("gqa"), seed=7, zero_b=False)
    changes = {"validation__eval_iters": 2}
    methods = [("LoRA", {"dropout": dropout}) for dropout in (0.0, 0.5)]
    first, second = (ranks.run(_answers, 1, str(model_folder("gqa")), changes, method, begin)[0][1] for method in methods)
    assert first == second
    assert [split for split, _ in first] == ["validation", "test"]
