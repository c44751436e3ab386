"""Settings that megatron-core asserts over are errors with their names, before processes start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch.distributed as dist

from formats.errors import UserError
from tests.trainer.settings import settings
from trainer import rehearsal
from trainer.model import ModelProvider
from trainer.settings import refused
from trainer.settings.resolve import resolve

pytestmark = pytest.mark.filterwarnings("ignore")  # megatron-core's own, which commands do not show

VERSION = "\n\nmegatron-core 0.19.2 says ("


def refusal(world_size: int = 1, **changes: Any) -> str:
    config = settings(mixed_precision="fp32", **changes)
    with pytest.raises(UserError) as caught:
        rehearsal.rehearse(resolve(config, world_size=world_size, device="cpu").config.model, world_size=world_size)
    assert not dist.is_initialized()
    return str(caught.value)


def alone(setting: str, value: Any) -> str:
    return f"megatron-core refuses `{setting}={value}`\n\nhint: leave `{setting}` out, or change what it depends on"


@pytest.mark.parametrize(
    ("setting", "value"),
    [("moe_layer_freq", 0), ("moe_router_padding_for_quantization", True)],
)
def test_what_megatron_core_refuses_when_it_builds_is_named_beforehand(setting: str, value: Any) -> None:
    ours, _, theirs = refusal(**{f"model__{setting}": value}).partition(VERSION)
    assert ours == alone(f"model.{setting}", value)
    assert theirs


def test_all_stages_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(mixed_precision="fp32", model__pipeline_model_parallel_size=2)
    ranks: list[int] = []
    monkeypatch.setattr("trainer.model.shapes", lambda _: ranks.append(dist.get_rank()))
    rehearsal.rehearse(resolve(config, world_size=4, device="cpu").config.model, world_size=4)
    assert ranks == [0, 3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__kv_channels": 0}, alone("model.kv_channels", 0)),
        ({"model__moe_router_topk": 1}, alone("model.moe_router_topk", 1)),
        (
            {"ddp__num_buckets": 2},
            (
                "`ddp.num_buckets` is `2`, which does not work here: megatron-core does not read it\n\n"
                "hint: leave `ddp.num_buckets` out"
            ),
        ),
        ({"optimizer__use_precision_aware_optimizer": True}, alone("optimizer.use_precision_aware_optimizer", True)),
        ({"model__pipeline_model_parallel_layout": "nonsense"}, alone("model.pipeline_model_parallel_layout", "nonsense")),
        ({"model__pipeline_model_parallel_layout": []}, alone("model.pipeline_model_parallel_layout", "[]")),
        (
            {"model__heterogeneous_block_specs": True},
            (
                "`model.heterogeneous_block_specs` is `True`, which does not work here: layers that differ need megatron-core's "
                "heterogeneous configuration\n\nhint: leave `model.heterogeneous_block_specs` out"
            ),
        ),
        (
            {"optimizer__optimizer_cuda_graph": True},
            (
                "`optimizer.optimizer_cuda_graph` is `True`, which does not work here: CUDA graphs of the optimizer are not "
                "captured\n\n"
                "hint: leave `optimizer.optimizer_cuda_graph` out"
            ),
        ),
        (
            {"ddp__num_distributed_optimizer_instances": 2},
            (
                "`ddp.num_distributed_optimizer_instances` is `2`, which does not work here: one is all that groups are formed "
                "for\n\nhint: leave `ddp.num_distributed_optimizer_instances` out"
            ),
        ),
    ],
)
def test_what_is_refused_before_a_model_is_built_is_named(changes: dict[str, Any], message: str) -> None:
    assert refusal(**changes).partition(VERSION)[0] == message


@dataclass
class Part:
    a: int = 0
    b: int = 0


def test_settings_that_do_not_go_together_are_named_together() -> None:
    def attempt(part: Part) -> None:
        if part.a and part.b:
            raise AssertionError("a library's words")

    error = refused.refusal("part", Part(1, 2), attempt, AssertionError("a library's words"))
    assert error.args[0] == "megatron-core refuses `part.a=1` and `part.b=2` together"
    assert error.hint == "leave one of them out\n\nmegatron-core 0.19.2 says: a library's words"


@dataclass(kw_only=True)
class Own(ModelProvider):
    """A model of the user's own."""

    def finalize(self) -> None:
        raise ValueError("a fault in the user's own code")


def test_a_fault_in_a_users_own_model_keeps_its_traceback() -> None:
    config = settings(mixed_precision="fp32")
    config.model = Own(num_layers=2, hidden_size=64, num_attention_heads=4, vocab_size=64)
    with pytest.raises(ValueError, match="a fault in the user's own code"):
        resolve(config, world_size=1, device="cpu")
