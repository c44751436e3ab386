"""Every field of megatron-core's configurations that a run accepts is carried out, or refused by name.

A field counts as carried out where another value changes the built model, the optimizer or the step (`OBSERVED`; on a GPU, the
trials of `test_gpu_settings`), or where a test is about it (`NAMED`). All others must be refused.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import distributed
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnBackend

from formats.errors import UserError
from tests.trainer import observed
from tests.trainer.observed import Trial
from tests.trainer.settings import HOPPER
from tests.trainer.test_gpu_settings import ON_ONE_GPU, ON_TWO_GPUS
from tests.trainer.trials import BUCKETS, BUILT, MOE, OBSERVED, SENT
from trainer.settings import unsupported
from trainer.settings.resolve import resolve

pytestmark = pytest.mark.filterwarnings("ignore")  # megatron-core's own, which commands do not show

KINDS = {
    "model": TransformerConfig,
    "ddp": distributed.DistributedDataParallelConfig,
    "optimizer": OptimizerConfig,
}
EVERY = [
    f"{section}.{field.name}" for section, kind in KINDS.items() for field in dataclasses.fields(kind) if field.name[0] != "_"
]

DECIDED: dict[str, Any] = {
    "model.attention_backend": AttnBackend.flash,
    "model.use_cpu_initialization": False,
    "model.masked_softmax_fusion": True,
    "model.bias_activation_fusion": True,
    "model.bias_dropout_fusion": True,
    "model.apply_rope_fusion": True,
    "model.persist_layer_norm": True,
    "model.cross_entropy_loss_fusion": True,
}
"""Settings that say which kernels compute. A CPU has one for each, and a run tells why; on a GPU, `test_gpu_settings` tries them,
but for those that `unsupported.ALWAYS_ON_GPUS` names."""

_TRANSFORMERS = "test_parity.py::test_the_curve_is_that_of_transformers_and_adamw"
_GPUS = "test_gpu.py::test_layouts_over_two_gpus_leave_one_gpus_curve_no_further_than_bf16_leaves_that_of_fp32"
_OVERLAP = "test_overlap.py::test_data_parallel_gpus_overlap_gradients_and_with_the_distributed_optimizer_weights"
_HERE, _EXPERTS = "test_contradictions.py::", "test_expert_settings.py::"
_INDEXER = "test_sparse_attention.py::test_a_field_of_the_indexer_changes_what_is_built_or_computed"
_CAPTURED = "test_gpu_cuda_graph.py::test_a_captured_step_trains_as_its_kernels_do"
_AHEAD = "layers/test_prediction.py::test_losses_and_gradients_are_those_of_transformers_layers"
NAMED: dict[str, str] = {
    "model.tensor_model_parallel_size": _TRANSFORMERS,
    "model.pipeline_model_parallel_size": _TRANSFORMERS,
    "model.virtual_pipeline_model_parallel_size": _TRANSFORMERS,
    "model.sequence_parallel": _GPUS,
    "model.context_parallel_size": _GPUS,
    "model.expert_model_parallel_size": "peft/test_experts.py::test_experts_are_trained_the_same_wherever_they_lie",
    "model.moe_flex_dispatcher_backend": _EXPERTS + "test_a_dispatcher_that_is_not_installed_is_refused_with_what_to_install",
    "model.moe_flex_dispatcher_num_sms": _EXPERTS + "test_settings_of_another_dispatcher_are_refused",
    "model.moe_per_layer_logging": "test_expert_metrics.py::test_each_layers_numbers_are_logged_on_request",
    "model.mtp_num_layers": _AHEAD,
    "model.cuda_graph_impl": _CAPTURED,
    "model.cuda_graph_warmup_steps": _CAPTURED,
    "model.dsa_indexer_n_heads": _INDEXER,
    "model.dsa_indexer_head_dim": _INDEXER,
    "model.dsa_indexer_topk": _INDEXER,
    "model.dsa_indexer_topk_freq": _INDEXER,
    "model.dsa_indexer_skip_topk_offset": _INDEXER,
    "model.dsa_indexer_rope_interleaved": _INDEXER,
    "model.dsa_indexer_rotate_activation": _INDEXER,
    "model.dsa_indexer_k_norm_epsilon": _INDEXER,
    "model.mtp_loss_scaling_factor": _AHEAD,
    "model.disable_bf16_reduced_precision_matmul": _HERE + "test_products_in_bf16_are_summed_as_precisely_as_somebody_asks",
    "model.tp_comm_overlap": "test_gpu.py::test_fp8_overlaps_tensor_parallel_messages",
    "model.overlap_p2p_comm": "test_overlap.py::test_virtual_stages_send_while_they_compute_and_plain_stages_in_batches",
    "model.batch_p2p_comm": "test_overlap.py::test_four_stages_with_virtual_ones_may_send_in_batches",
    "model.batch_p2p_sync": _HERE + "test_stages_wait_for_batches_of_messages_unless_somebody_knows_better",
    "ddp.overlap_grad_reduce": _OVERLAP,
    "ddp.overlap_param_gather": _OVERLAP,
    "ddp.align_param_gather": _HERE + "test_gathering_is_aligned_where_somebody_asks_for_it",
    "optimizer.overlap_param_gather": _OVERLAP,
}
"""Settings that a test is about."""


def other(field: dataclasses.Field[Any]) -> Any:
    """A value that is not a field's default."""
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if isinstance(default, bool):
        return not default
    if isinstance(default, torch.dtype):
        return torch.float16
    if isinstance(default, (int, float)):
        return default + 2
    return [2] if isinstance(default, (list, tuple)) else "other" if isinstance(default, str) else 2


COVERED = {*OBSERVED, *BUILT, *SENT, *NAMED, *DECIDED, *ON_ONE_GPU, *ON_TWO_GPUS}
REFUSED = [setting for setting in EVERY if setting not in COVERED]


@pytest.mark.parametrize("setting", REFUSED)
def test_a_field_that_nothing_carries_out_is_refused_by_name(setting: str) -> None:
    section, _, name = setting.partition(".")
    (field,) = (candidate for candidate in dataclasses.fields(KINDS[section]) if candidate.name == name)
    config = observed.settings(**{setting: other(field)})
    with pytest.raises(UserError) as refused:
        resolve(config, world_size=1, device="gpu", machine=HOPPER)
    assert f"`{setting}`" in str(refused.value) or f"`{setting}=" in str(refused.value)


def test_a_field_that_a_newer_megatron_core_has_is_not_refused_by_chance() -> None:
    """So it fails the test above, until somebody decides about it."""
    config = observed.settings()
    newer = dataclasses.make_dataclass("Newer", [("switch", bool, dataclasses.field(default=False))], bases=(type(config.model),))
    fields = {field.name: getattr(config.model, field.name) for field in dataclasses.fields(config.model) if field.init}
    config.model = newer(**fields, switch=True)
    assert resolve(config, world_size=1, device="gpu", machine=HOPPER).config.model.switch


def test_every_field_of_the_three_is_walked() -> None:
    private = [field.name for kind in KINDS.values() for field in dataclasses.fields(kind) if field.name[0] == "_"]
    assert private == ["_cpu_offloading_context"]
    assert len({*EVERY}) + len(private) == sum(len(dataclasses.fields(kind)) for kind in KINDS.values())
    assert {*REFUSED} | COVERED == {*EVERY}
    assert all(any(setting.startswith(f"{section}.") for setting in REFUSED) for section in KINDS)


@pytest.mark.parametrize("setting", [name for name in DECIDED if name not in ON_ONE_GPU])
def test_a_kernel_that_gpus_always_have_cannot_be_switched_off(setting: str) -> None:
    assert setting in unsupported.ALWAYS_ON_GPUS
    with pytest.raises(UserError, match=f"`{setting}` is `False`, which does not work on GPUs: "):
        resolve(observed.settings(**{setting: False}), world_size=1, device="gpu", machine=HOPPER)
    assert resolve(observed.settings(**{setting: True}), world_size=1, device="gpu", machine=HOPPER)


def test_a_run_that_is_done_twice_is_no_change(ranks: Any) -> None:
    """Also where its numbers are drawn, and experts or buckets have an order."""
    bases = [{"model.hidden_dropout": 0.1}, MOE, BUCKETS]
    same = {f"train.{name}": Trial(value, base) for (name, value), base in zip(_AS_EVER.items(), bases, strict=True)}
    assert ranks.run(observed.differences, 1, same) == [{setting: [] for setting in same}]


_AS_EVER = {"train_iters": observed.STEPS, "global_batch_size": 2, "micro_batch_size": 1}
"""What `observed.settings` sets."""


def test_no_field_is_both_refused_and_carried_out() -> None:
    refused = {setting for setting, _ in unsupported.never_supported()}
    assert not refused & COVERED
    assert refused <= set(EVERY)
    assert set(EVERY) >= COVERED


@pytest.fixture(scope="module")
def changed(ranks: Any) -> dict[str, list[str]]:
    """For each setting that one process can try, what it changes."""
    (changes,) = ranks.run(_changes, 1, OBSERVED, BUILT)
    return changes


def _changes(run: dict[str, Trial], built: dict[str, Trial]) -> dict[str, list[str]]:
    return observed.differences(run) | observed.differences(built, observed.build)


@pytest.mark.slow
@pytest.mark.parametrize("setting", [*OBSERVED, *BUILT])
def test_a_setting_changes_what_is_built_or_done(setting: str, changed: dict[str, list[str]]) -> None:
    assert changed[setting]
    assert set(changed[setting]) <= set(observed.PARTS)


@pytest.fixture(scope="module")
def plain(ranks: Any) -> Any:
    """What two ranks do with the settings that a trial has both times, by their text."""
    made: dict[str, Any] = {}

    def make(base: dict[str, Any]) -> Any:
        if repr(base) not in made:
            once, again = (ranks.run(observed.observe, 2, base) for _ in range(2))
            assert [run["operations"] for run in once] == [run["operations"] for run in again]
            made[repr(base)] = again
        return made[repr(base)]

    return make


@pytest.mark.parametrize("setting", SENT)
def test_a_setting_changes_what_pipeline_stages_do(setting: str, ranks: Any, plain: Any) -> None:
    trial = SENT[setting]
    before, after = plain(trial.base), ranks.run(observed.observe, 2, {**trial.base, setting: trial.value})
    assert not any("error" in run for run in [*after, *before]), after
    assert [run["operations"] for run in after] != [run["operations"] for run in before]


@pytest.mark.parametrize("setting", DECIDED)
def test_a_kernel_that_a_cpu_lacks_is_told_of(setting: str) -> None:
    answer = resolve(observed.settings(**{setting: DECIDED[setting]}), world_size=1, device="cpu")
    (why,) = [choice.why for choice in answer.explanations if choice.setting == setting]
    assert why == "the CPU has none of CUDA's kernels"


@pytest.mark.parametrize("setting", NAMED)
def test_the_test_that_is_named_for_a_setting_is_there(setting: str) -> None:
    file, _, test = NAMED[setting].partition("::")
    text = (Path(__file__).parent / file).read_text()
    assert re.search(rf"^def {test}\(", text, re.MULTILINE)
    assert re.search(rf"\b{setting.partition('.')[2]}\b|__{setting.partition('.')[2]}\b", text)
