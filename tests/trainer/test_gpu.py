"""On GPUs with Transformer Engine: weights, logits, layouts and precisions. Left out by `make test`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests import models
from tests.trainer import small
from tests.trainer.peft import runs as adapters

pytestmark = pytest.mark.gpu

SHAPE = {
    "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 4096, "max_position_embeddings": 512,
}  # fmt: skip
GPU = {"dist__device": "gpu", "dataset__sequence_length": 128}
BF16 = {**GPU, "mixed_precision": "bf16_mixed"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small Llama that Transformer Engine's kernels take."""
    return models.save(models.build("gqa", **SHAPE), tmp_path_factory.mktemp("gpu") / "model")


@pytest.fixture(scope="module")
def one_gpu(ranks, folder):
    """The bf16 run that layouts are held against."""
    (history,) = ranks.run(small.train, 1, str(folder), BF16)
    return history


@pytest.fixture(scope="module")
def exact(ranks, folder):
    """The same run in fp32."""
    (history,) = ranks.run(small.train, 1, str(folder), GPU)
    return history


def _logits(source: str, config: dict, dtype: str, tokens: list[list[int]]) -> tuple[str, torch.Tensor]:
    """What was loaded, and the logits of the running model."""
    from trainer import model, parallel
    from trainer.checkpoints import live
    from trainer.config import RunConfig
    from trainer.model import from_hf_config
    from trainer.settings.resolve import resolve

    run = RunConfig(model=from_hf_config(config), mixed_precision=dtype)
    run.optimizer.lr = 1e-4
    run.dataset.sequence_length = len(tokens[0])
    resolved = resolve(run, world_size=1, device="gpu").config
    with parallel.session(resolved, "gpu"), torch.no_grad():
        (chunk,) = model.build(resolved.model)
        chunk = chunk.to(resolved.model.params_dtype).eval()
        loaded = live.load([chunk], source)
        ids = torch.tensor(tokens, device="cuda")
        positions = torch.arange(ids.shape[1], device="cuda").expand_as(ids)
        return str(loaded), chunk(ids, positions, None).float().cpu()


@pytest.mark.parametrize(("dtype", "name", "tolerance"), [("bfloat16", "bf16_mixed", 0.06), ("float32", "fp32", 2e-4)])
def test_a_converted_llama_of_1b_shape_has_transformers_logits(dtype, name, tolerance, tmp_path, ranks):
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    from converter import hf_to_mcore
    from trainer.recipes import find

    config = find("llama32_1b").pretrain_config().model.hf_config
    torch.manual_seed(0)
    with torch.device("cuda"):
        LlamaForCausalLM(LlamaConfig(**config)).to(getattr(torch, dtype)).save_pretrained(tmp_path / "hf")
    hf_to_mcore(str(tmp_path / "hf"), str(tmp_path / "megatron"), tp=2, pp=2)
    tokens = torch.randint(0, config["vocab_size"], (1, 256)).tolist()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=getattr(torch, dtype)).cuda()
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens, device="cuda")).logits.float().cpu()
    del theirs
    torch.cuda.empty_cache()
    for source, count in (("hf", 146), ("megatron", 98)):
        ((loaded, logits),) = ranks.run(_logits, 1, str(tmp_path / source), config, name, tokens)
        assert loaded == f"loaded {count} of {count} tensors, 1.24 B parameters"
        difference = (logits[..., : config["vocab_size"]] - expected).abs().max().item()
        print(f"{dtype} {source}: largest difference of logits {difference:.2e}, logits span {expected.abs().max():.2f}")
        assert difference < tolerance * max(1.0, expected.abs().max().item())


def _distance(first, second):
    """The largest difference of two curves."""
    return max(abs(a - b) for a, b in zip(first.losses, second.losses, strict=True))


def test_fp32_on_the_gpu_follows_the_cpu(ranks, folder):
    slower = {"optimizer__lr": 1e-3, "optimizer__min_lr": 1e-4}  # a larger step makes more of what rounding began
    (cpu,) = ranks.run(small.train, 1, str(folder), {"dataset__sequence_length": 128, **slower})
    (gpu,) = ranks.run(small.train, 1, str(folder), {**GPU, **slower})
    print("fp32: largest difference of losses", max(abs(a - b) for a, b in zip(cpu.losses, gpu.losses, strict=True)))
    assert gpu.losses == pytest.approx(cpu.losses, abs=1e-3)


def test_fp16_leaves_the_curve_of_fp32_no_further_than_bf16_does(ranks, folder, one_gpu, exact):
    # The default scale, 2^32, is halved every other step until gradients, of the sum over tokens, no longer overflow: longer than
    # this run.
    (history,) = ranks.run(
        small.train, 1, str(folder), {**GPU, "mixed_precision": "fp16_mixed", "optimizer__initial_loss_scale": 32.0}
    )
    print(f"last losses: fp16 {history.losses[-1]}, bf16 {one_gpu.losses[-1]}, fp32 {exact.losses[-1]}")
    assert _distance(history, exact) <= _distance(one_gpu, exact)


@pytest.mark.parametrize(
    "precision",
    [
        "bf16_with_fp8_delayed_scaling_mixed",
        "bf16_with_fp8_current_scaling_mixed",
        "bf16_with_fp8_subchannel_scaling_mixed",
    ],
)
def test_fp8_trains(precision, ranks, folder, one_gpu):
    (history,) = ranks.run(small.train, 1, str(folder), {**GPU, "mixed_precision": precision})
    print(precision, "last loss", history.losses[-1], "bf16", one_gpu.losses[-1])
    assert history.losses[0] == pytest.approx(one_gpu.losses[0], abs=0.1)
    assert history.losses[-1] == pytest.approx(one_gpu.losses[-1], abs=0.1)


def test_fp8_weights_load_and_train(ranks, folder, one_gpu):
    settings = {**GPU, "mixed_precision": "bf16_with_fp8_current_scaling_mixed"}
    settings |= {"ddp__use_distributed_optimizer": True, "ddp__fp8_param_gather": True}
    (history,) = ranks.run(small.train, 1, str(folder), settings)
    assert history.losses[0] == pytest.approx(one_gpu.losses[0], abs=0.1)
    assert history.losses[-1] == pytest.approx(one_gpu.losses[-1], abs=0.1)


@pytest.mark.parametrize("precision", ["bf16_with_mxfp8_mixed", "bf16_with_nvfp4_mixed"])
def test_precisions_of_blackwell_are_refused_at_the_start(precision, folder):
    from formats.errors import UserError
    from trainer.settings.resolve import resolve

    config = small.settings(folder, mixed_precision=precision)
    with pytest.raises(UserError, match=r"needs a GPU of compute capability `10\.0` or higher; this one has `9\.0`"):
        resolve(config, world_size=1, device="gpu")


OVERLAP = {"comm_overlap__tp_comm_overlap": True}
LAYOUTS = {
    "tp2": {"model__tensor_model_parallel_size": 2},
    "tp2_sp": {"model__tensor_model_parallel_size": 2, "model__sequence_parallel": True},
    "tp2_sp_overlap": {"model__tensor_model_parallel_size": 2, "model__sequence_parallel": True, **OVERLAP},
    "pp2": {"model__pipeline_model_parallel_size": 2},
    "vpp2": {"model__pipeline_model_parallel_size": 2, "model__virtual_pipeline_model_parallel_size": 2},
    "cp2": {"model__context_parallel_size": 2},
    "dp2": {"ddp__use_distributed_optimizer": True},
    "recompute": {
        "model__recompute_granularity": "full",
        "model__recompute_method": "uniform",
        "model__recompute_num_layers": 1,
    },
}


def _two_gpus():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_over_two_gpus_leave_one_gpus_curve_no_further_than_bf16_leaves_that_of_fp32(
    layout, ranks, folder, one_gpu, exact
):
    _two_gpus()
    rounding = _distance(one_gpu, exact)
    for history in ranks.run(small.train, 2, str(folder), {**BF16, **LAYOUTS[layout]}):
        print(f"{layout}: {_distance(history, one_gpu):.4f} from one GPU, {_distance(history, exact):.4f} from fp32, "
              f"which one GPU leaves by {rounding:.4f}")  # fmt: skip
        # Two curves that are each as far from the exact one may lie on either side of it.
        assert _distance(history, one_gpu) <= 2 * rounding


@pytest.mark.parametrize("layout", ["tp2", "pp2", "vpp2", "dp2", "recompute"])
def test_layouts_over_two_gpus_give_one_gpus_curve_in_fp32(layout, ranks, folder, exact):
    """Neither context parallelism nor Transformer Engine's buffers exist in fp32."""
    _two_gpus()
    for history in ranks.run(small.train, 2, str(folder), {**GPU, **LAYOUTS[layout]}):
        print(f"{layout}: {_distance(history, exact):.2e} from one GPU in fp32")
        assert history.losses == pytest.approx(exact.losses, abs=1e-3)
        assert history.grad_norms == pytest.approx(exact.grad_norms, rel=1e-3)


def test_fp8_overlaps_tensor_parallel_messages(ranks, folder):
    _two_gpus()
    settings = {**GPU, "mixed_precision": "bf16_with_fp8_current_scaling_mixed", **LAYOUTS["tp2_sp"]}
    apart, overlapped = (ranks.run(small.train, 2, str(folder), {**settings, **more})[1] for more in ({}, OVERLAP))
    print(f"fp8: {_distance(apart, overlapped):.4f} with overlap")
    assert overlapped.losses == pytest.approx(apart.losses, rel=2**-7)


@pytest.fixture(scope="module")
def adapted(ranks, folder):
    """Random adapters, and what the CPU's fp32 makes of them."""
    known = {}

    def make(kind):
        if kind not in known:
            (first,) = ranks.run(adapters.run, 1, str(folder), adapters.ONE_STEP, kind, {})
            made = torch.Generator().manual_seed(5)
            random = {name: torch.randn(weight.shape, generator=made) * 0.05 for name, weight in first["weights"].items()}
            begin = {name: first["weights"][name] if "magnitude" in name else weight for name, weight in random.items()}
            (result,) = ranks.run(adapters.run, 1, str(folder), {"dataset__sequence_length": 128}, kind, {}, begin)
            known[kind] = begin, result["losses"], result["grad_norms"]
        return known[kind]

    return make


@pytest.mark.parametrize("kind", ["LoRA", "DoRA"])
def test_adapters_beside_transformer_engines_layers_follow_the_cpu(kind, ranks, folder, adapted):
    begin, losses, norms = adapted(kind)
    (result,) = ranks.run(adapters.run, 1, str(folder), GPU, kind, {}, begin)
    print(kind, "largest difference of losses", max(abs(a - b) for a, b in zip(result["losses"], losses, strict=True)))
    assert result["losses"] == pytest.approx(losses, abs=1e-3)
    assert result["grad_norms"] == pytest.approx(norms, rel=1e-2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["LoRA", "DoRA"])
def test_adapters_over_two_gpus_train_as_on_one(kind, layout, ranks, folder, adapted):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    begin, losses, norms = adapted(kind)
    for result in ranks.run(adapters.run, 2, str(folder), {**BF16, **LAYOUTS[layout]}, kind, {}, begin):
        assert result["losses"] == pytest.approx(losses, rel=2**-7)
        assert result["grad_norms"][0] == pytest.approx(norms[0], rel=0.05)


@pytest.mark.parametrize("kind", ["LoRA", "DoRA"])
def test_adapters_train_beside_fp8(kind, ranks, folder, adapted):
    begin, losses, _ = adapted(kind)
    settings = {**GPU, "mixed_precision": "bf16_with_fp8_current_scaling_mixed"}
    for changes in ({}, {"ddp__use_distributed_optimizer": True, "ddp__fp8_param_gather": True}):
        (result,) = ranks.run(adapters.run, 1, str(folder), settings | changes, kind, {}, begin)
        assert result["losses"][-1] == pytest.approx(losses[-1], abs=0.1)


def test_a_checkpoint_of_a_gpu_resumes_exactly_and_exports(ranks, folder, tmp_path):
    from converter import mcore_to_hf

    settings = {**BF16, "ddp__use_distributed_optimizer": True, "checkpoint__save": str(tmp_path / "run")}
    (whole,) = ranks.run(small.train, 1, str(folder), {**settings, "checkpoint__save": None})
    (first,) = ranks.run(small.train, 1, str(folder), {**settings, "train__exit_interval": 8, "checkpoint__async_save": True})
    (rest,) = ranks.run(small.train, 1, str(folder), {**settings, "checkpoint__load": str(tmp_path / "run")})
    assert first.losses + rest.losses == pytest.approx(whole.losses, abs=2e-3)
    mcore_to_hf(str(tmp_path / "run"), str(tmp_path / "back"))
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "bfloat16"
    assert Path(tmp_path / "back" / "model.safetensors").exists()


def _generated(folder: str, prompts: list[str]) -> list[list[int]]:
    from trainer.generation import checkpoint
    from trainer.generation.sampling import Sampling

    generated = []
    checkpoint.run(
        folder,
        lambda: prompts,
        settings=checkpoint.make_run(folder, (), world_size=1, dtype="fp32"),
        max_new_tokens=16,
        sampling=Sampling(),
        tell=None,
        done=lambda answers, _: generated.extend(list(answer.tokens) for answer in answers),
    )
    return generated


def test_greedy_text_on_the_gpu_is_transformers(ranks, tmp_path):
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    folder = models.save(models.build("gqa", **{**SHAPE, "vocab_size": 384}), tmp_path / "model")
    prompts = ["Tiny real models", "a tokenizer"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    expected = []
    for prompt in prompts:
        asked = tokenizer(prompt, return_tensors="pt")["input_ids"]
        answer = model.generate(asked, attention_mask=torch.ones_like(asked), do_sample=False, max_new_tokens=16, pad_token_id=0)
        expected.append(answer[0, asked.shape[1] :].tolist())
    assert ranks.run(_generated, 1, str(folder), prompts) == [expected]
