"""What the examples say of themselves happens."""

from __future__ import annotations

import contextlib
import io
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def _as_script(name, *arguments):
    """What the file prints, run as a program on this rank."""
    heard = io.StringIO()
    before, sys.argv = sys.argv, [name, *arguments]
    try:
        with contextlib.redirect_stderr(heard):
            runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    finally:
        sys.argv = before
    return heard.getvalue()


def _losses(text):
    return [float(number) for number in re.findall(r"step +\d+/\d+  loss +([\d.]+)", text)]


def _norms(text):
    return [float(number) for number in re.findall(r"grad norm +([\d.]+)", text)]


def _train(name, settings, step=None, **changes):
    """The history of an example's run, with changes to its settings; `step` names its forward step."""
    from tests.trainer.small import History
    from trainer import forward_step, pretrain

    example = runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name=name)
    sys.modules.setdefault(name, type(sys)(name))  # where its dataclasses look for the module they are of
    history, config = History(), example["settings"](**settings)
    for dotted, value in changes.items():
        section, _, setting = dotted.partition("__")
        setattr(getattr(config, section), setting, value)
    pretrain(config, example[step] if step else forward_step, callbacks=[history])
    return history


def test_there_is_a_test_for_every_example():
    tested = Path(__file__).read_text()
    assert all(f'"{path.stem}"' in tested or f"{path.stem}.py" in tested for path in EXAMPLES.glob("*.py"))


@pytest.mark.slow
def test_the_quickstart_runs_by_itself_and_leaves_a_model_that_transformers_loads(tmp_path):
    from transformers import AutoModelForCausalLM

    save = tmp_path / "run"
    command = [sys.executable, str(EXAMPLES / "quickstart.py"), "--save", str(save)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    assert "loaded 21 of 21 tensors, 139584 parameters" in done.stderr
    assert len(_losses(done.stderr)) == 10
    trained = AutoModelForCausalLM.from_pretrained(f"{save}-huggingface")
    assert trained.config.vocab_size == 512


def test_the_quickstart_at_tp2_starts_with_the_same_loss(ranks):
    alone, spread = ranks.run(_as_script, 1, "quickstart"), ranks.run(_as_script, 2, "quickstart", "--tp", "2")
    assert _losses(spread[-1])[0] == pytest.approx(_losses(alone[-1])[0], abs=5e-3)  # bf16 sums in another order


def test_importing_the_trainer_brings_no_torch():
    program = "import sys, trainer; trainer.__dir__(); assert 'torch' not in sys.modules and 'megatron' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=900)


def test_an_unknown_name_of_the_trainer_is_an_attribute_error():
    import trainer

    assert trainer.recipes.find("llama_tiny").name == "llama_tiny"
    with pytest.raises(AttributeError, match="module `trainer` has no `pretrian`"):
        trainer.pretrian  # noqa: B018


def _z_loss_by_torch(model_folder, coefficient):
    """The first step's loss and gradient norm, by transformers and torch alone."""
    from transformers import AutoModelForCausalLM

    from tests.trainer import small

    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    samples = small.FixedTokens(model.config.vocab_size).build(None, 0, (small.BATCH, 0, 0))[0]
    tokens, labels = (torch.stack([samples[i][name] for i in range(small.BATCH)]) for name in ("tokens", "labels"))
    logits = model(tokens).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    loss = loss + coefficient * logits.logsumexp(dim=-1).square().mean()
    loss.backward()
    return loss.item(), torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()


def _one_step_of_z_loss(folder, tp):
    from tests.trainer import small
    from trainer import pretrain

    example = runpy.run_path(str(EXAMPLES / "forward_step.py"), run_name="forward_step")
    history = small.History()
    changes = {"train__train_iters": 1, "scheduler__lr_warmup_iters": 0, "model__tensor_model_parallel_size": tp}
    pretrain(small.settings(Path(folder), **changes), example["z_loss_step"], callbacks=[history])
    return history.losses[0], history.grad_norms[0], example["COEFFICIENT"]


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("variant", ["gqa", "padded_vocab"])
def test_the_z_loss_is_that_of_torch_with_and_without_tensor_parallelism(tp, variant, ranks, model_folder):
    folder = model_folder(variant)
    for loss, norm, coefficient in ranks.run(_one_step_of_z_loss, tp, str(folder), tp):
        assert (loss, norm) == pytest.approx(_z_loss_by_torch(folder, coefficient), abs=1e-4)  # fp32, summed in another order


def test_the_forward_step_runs(ranks):
    losses = _losses(ranks.run(_as_script, 1, "forward_step")[0])
    assert len(losses) == 10
    assert losses[-1] < losses[0]


def test_the_dataset_teaches_to_add_and_is_dealt_to_ranks(ranks):
    changes = {"train__train_iters": 12}
    (alone,) = ranks.run(_history_of_dataset, 1, changes)
    for spread in ranks.run(_history_of_dataset, 2, changes):
        assert spread.losses == pytest.approx(alone.losses, abs=1e-4)  # fp32, summed in another order
        assert spread.grad_norms == pytest.approx(alone.grad_norms, rel=1e-3)
    assert alone.losses[-1] < alone.losses[0] - 1


def _history_of_dataset(changes):
    return _train("dataset", {}, **changes)


def _history_of_model(settings, changes):
    history = _train("model", settings, **changes)
    return history.losses, history.grad_norms, {name: weight.numpy() for name, weight in history.weights.items()}


def test_a_module_of_ones_own_trains_saves_and_resumes(ranks, tmp_path):
    """Ten steps, then ten more from the checkpoint, are twenty."""
    changes = {"validation__eval_iters": 0}
    ((whole, _, weights),) = ranks.run(_history_of_model, 1, {"steps": 20}, changes)
    ranks.run(_history_of_model, 1, {"steps": 10, "save": str(tmp_path)}, changes)
    ((rest, _, resumed),) = ranks.run(_history_of_model, 1, {"steps": 20, "save": str(tmp_path)}, changes)
    assert rest == whole[10:]
    assert all((resumed[name] == weight).all() for name, weight in weights.items())
    assert whole[-1] < whole[0] - 0.5


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model__tensor_model_parallel_size": 2},
        {"ddp__use_distributed_optimizer": True},
    ],
    ids=["dp2", "tp2", "distributed"],
)
def test_a_module_of_ones_own_gives_the_same_curve_on_two_ranks(changes, ranks):
    changes = {"validation__eval_iters": 0, **changes}
    ((alone, norms, _),) = ranks.run(_history_of_model, 1, {"steps": 10}, {"validation__eval_iters": 0})
    for losses, grad_norms, _ in ranks.run(_history_of_model, 2, {"steps": 10}, changes):
        assert losses == pytest.approx(alone, abs=1e-4)  # fp32, summed in another order
        assert grad_norms == pytest.approx(norms, rel=1e-3)


def test_a_module_of_ones_own_resumes_at_another_layout_in_bf16(ranks, tmp_path):
    ranks.run(_bf16_model, 2, {"steps": 6, "save": str(tmp_path)})
    (resumed,) = ranks.run(_bf16_model, 1, {"steps": 12, "save": str(tmp_path)})
    (whole,) = ranks.run(_bf16_model, 1, {"steps": 12})
    assert resumed == pytest.approx(whole[6:], abs=2e-2)  # bf16, of two ranks and of one


def _bf16_model(settings):
    from tests.trainer.small import History
    from trainer import pretrain

    example = runpy.run_path(str(EXAMPLES / "model.py"), run_name="model")
    history, config = History(), example["settings"](**settings)
    config.mixed_precision, config.validation.eval_iters = "bf16_mixed", 0
    pretrain(config, callbacks=[history])
    return history.losses


def test_a_module_without_stages_refuses_a_pipeline(ranks):
    (message, _) = ranks.run(_refused_pipeline, 2)
    assert message == (
        "`model.pipeline_model_parallel_size` is `2`, but `Gru` cannot be cut into stages\n\nhint: give it `set_input_tensor`, "
        "as megatron-core's GPTModel has it, or leave the pipeline out"
    )


def _refused_pipeline():
    from formats.errors import UserError

    try:
        _train("model", {}, model__pipeline_model_parallel_size=2)
    except UserError as error:
        return str(error)
    return None


def test_the_callback_stops_the_run_right_after_the_evaluation(ranks):
    for text in ranks.run(_as_script, 2, "callback"):
        seen = [float(loss) for loss in re.findall(r"validation loss ([\d.]+)", text)]
        if not seen:  # one rank speaks
            continue
        stopped = int(re.findall(r"stopping after step (\d+)", text)[0])
        assert stopped == 5 * len(seen) < 200
        assert min(seen) - 0.02 <= min(seen[-2:])
        assert len(re.findall(r"step \d+: the weights' norm is", text)) == len(seen)
        break
    else:
        pytest.fail("no rank told of an evaluation")


def _stop_on_step(at, rank):
    from tests.trainer.small import History
    from trainer import Callback, pretrain

    class Once(Callback):
        def on_step(self, run, step):
            if run.progress.iteration == at and int(os.environ["RANK"]) == rank:
                run.stop.request()

    example = runpy.run_path(str(EXAMPLES / "model.py"), run_name="model")
    return pretrain(example["settings"](), callbacks=[Once(), History()]).iteration


def test_one_rank_may_ask_all_to_stop_after_the_next_step(ranks):
    assert ranks.run(_stop_on_step, 2, 3, 1) == [4, 4]


def test_experts_give_the_same_curve_on_one_rank_and_on_two(ranks, tmp_path):
    ranks.run(_history_of_moe, 1, {"save": str(tmp_path)}, {"train__train_iters": 1})
    (alone,) = ranks.run(_history_of_moe, 1, {"start": str(tmp_path)}, {})
    for spread in ranks.run(_history_of_moe, 2, {"start": str(tmp_path), "ep": 2}, {}):
        assert spread.losses == pytest.approx(alone.losses, abs=1e-4)
        assert spread.grad_norms == pytest.approx(alone.grad_norms, abs=1e-4)
    assert len(alone.losses) == 10
    assert sum(alone.losses[-3:]) < sum(alone.losses[:3])


def _history_of_moe(settings, changes):
    history = _train("moe", settings, **changes)
    history.weights = {}
    return history


def _bottleneck(folder, changes):
    from tests.trainer import small
    from tests.trainer.peft.runs import Watched
    from trainer import pretrain

    example = runpy.run_path(str(EXAMPLES / "bottleneck.py"), run_name="bottleneck")
    sys.modules.setdefault("bottleneck", type(sys)("bottleneck"))
    config, history = small.settings(Path(folder), optimizer__lr=1e-2, **changes), Watched()
    config.peft = example["Bottlenecks"]()
    pretrain(config, callbacks=[history])
    return history.losses, history.grad_norms, sorted(history.weights)


def test_a_method_of_ones_own_trains_what_it_adds_at_every_layout(ranks, model_folder):
    folder = str(model_folder("gqa"))
    ((losses, norms, names),) = ranks.run(_bottleneck, 1, folder, {})
    assert losses[-1] < losses[0] - 0.5
    assert names[0] == "decoder.layers.0.mlp.linear_fc2.adapter.down.bias"
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    recomputed = {f"model__{name}": value for name, value in full.items()}
    for world, changes in ((2, {"model__tensor_model_parallel_size": 2}), (1, recomputed)):
        for other_losses, other_norms, other_names in ranks.run(_bottleneck, world, folder, changes):
            assert other_losses == pytest.approx(losses, abs=1e-4)
            assert other_norms == pytest.approx(norms, rel=1e-3)
            assert other_names == names


def test_the_bottleneck_runs(ranks):
    output = ranks.run(_as_script, 1, "bottleneck")[0]
    assert re.search(r"Bottlenecks: 34880 of 3\.4 M parameters are trained \(1\.03 %\), 8 modules", output)
    assert len(_losses(output)) == 20
