"""When a frozen layer is told to quantize its weight anew. Transformer Engine itself needs a GPU: here is what it is told."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from trainer.peft import Adapter, adapt


class Layer(torch.nn.Linear):
    """Keeps `is_first_microbatch` as megatron-core's layers on Transformer Engine do."""

    def __init__(self, recipe: str) -> None:
        super().__init__(4, 4, bias=False)
        self.config, self.is_first_microbatch, self.quantized = SimpleNamespace(fp8_recipe=recipe), True, []

    def forward(self, layer_input):
        self.quantized.append(self.is_first_microbatch)
        self.is_first_microbatch = False
        return super().forward(layer_input)


class Nothing(Adapter):
    def forward(self, output, layer_input):
        return output


@pytest.fixture(params=["tensorwise"])
def layer(request):
    made = adapt(Layer(request.param).requires_grad_(requires_grad=False), Nothing())
    assert isinstance(made, Layer)
    return made


def _step(layer: Layer, *, microbatches: int = 2) -> list[bool]:
    """Whether it quantized, microbatch by microbatch."""
    layer.is_first_microbatch = True  # as megatron-core's schedule has it
    before = len(layer.quantized)
    for _ in range(microbatches):
        layer(torch.ones(1, 4))
    return layer.quantized[before:]


def test_a_frozen_weight_is_quantized_once(layer):
    assert [_step(layer), _step(layer), _step(layer)] == [[True, False], [False, False], [False, False]]


def test_a_weight_that_changed_is_quantized_again(layer):
    _step(layer)
    layer.load_state_dict({"weight": torch.zeros(4, 4)})
    assert [_step(layer), _step(layer)] == [[True, False], [False, False]]


def test_what_was_quantized_for_evaluation_is_quantized_again_for_training(layer):
    with torch.no_grad():
        assert [_step(layer), _step(layer)] == [[True, False], [False, False]]
    assert [_step(layer), _step(layer)] == [[True, False], [False, False]]
    with torch.no_grad():
        assert _step(layer) == [False, False]


@pytest.mark.parametrize("layer", ["delayed"], indirect=True)
def test_delayed_scaling_quantizes_each_step_with_its_new_scale(layer):
    assert [_step(layer), _step(layer)] == [[True, False], [True, False]]


def test_a_weight_that_is_trained_is_quantized_each_step(layer):
    layer.weight.requires_grad_()
    assert [_step(layer), _step(layer)] == [[True, False], [True, False]]
