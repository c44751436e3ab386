"""One layer and its adapter, divided among ranks in every way, against torch; with sequence parallelism, dropout, merged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.trainer import small
from tests.trainer.peft.runs import mine

INPUTS, OUTPUTS, SEQUENCE, BATCH = 16, 24, 6, 2
SCALE = 2.0


def _values(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.3


def _layer(method, *, row, sequence_parallel, expert=False):
    """A layer of megatron-core's, with a bias that it adds, and its adapter."""
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        num_layers=1,
        hidden_size=INPUTS,
        num_attention_heads=2,
        use_cpu_initialization=True,
        tensor_model_parallel_size=2,
        sequence_parallel=sequence_parallel,
        **(
            {"num_moe_experts": 2, "expert_tensor_parallel_size": 2, "moe_ffn_hidden_size": OUTPUTS, "add_bias_linear": False}
            if expert
            else {}
        ),
    )
    how = {"input_is_parallel": True} if row else {"gather_output": False}
    how |= {"is_expert": True} if expert else {}
    kind = RowParallelLinear if row else ColumnParallelLinear
    layer = kind(INPUTS, OUTPUTS, config=config, init_method=torch.nn.init.zeros_, bias=not expert, skip_bias_add=row, **how)
    layer.weight.data.copy_(mine(_values((OUTPUTS, INPUTS), 1), layer.weight))
    if not (row or expert):
        layer.bias.data.copy_(mine(_values((OUTPUTS,), 2), layer.bias))
    layer.requires_grad_(requires_grad=False)
    inside = "mlp.experts.local_experts.0" if expert else "mlp"
    layer = method.transform(layer, f"decoder.layers.0.{inside}.linear_{'fc2' if row else 'x'}")
    layer.adapter.reset_parameters(torch.Generator().manual_seed(3))
    layer.adapter.linear_out.weight.data.copy_(mine(_values((OUTPUTS, method.dim), 4), layer.adapter.linear_out.weight))
    return layer


def _through(folder, kind, row, sequence_parallel, expert=False):
    """Forward and backward on two ranks: parts of the output, of the gradients of the input and of each parameter."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import mappings

    from trainer import parallel, peft

    config = small.settings(Path(folder), model__tensor_model_parallel_size=2, model__expert_tensor_parallel_size=2)
    with parallel.session(config, "cpu"):
        layer = _layer(getattr(peft, kind)(dim=4, alpha=8), row=row, sequence_parallel=sequence_parallel, expert=expert)
        rank, group = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_group()
        inputs, weights = _values((SEQUENCE, BATCH, INPUTS), 5), _values((SEQUENCE, BATCH, OUTPUTS), 6)
        cut = lambda tensor, dim: tensor.chunk(2, dim)[rank].contiguous()  # noqa: E731
        inputs = cut(inputs, 2) if row else cut(inputs, 0) if sequence_parallel else inputs
        weights = cut(weights, 0) if row and sequence_parallel else weights if row else cut(weights, 2)
        inputs.requires_grad_()
        output, _ = layer(inputs)
        output.backward(weights)
        gradients = {}
        for name, parameter in layer.named_parameters():
            if parameter.requires_grad:
                gradient = parameter.grad
                if parameter.sequence_parallel:  # what megatron-core's finalize_model_grads does
                    gradient = mappings._reduce(gradient.clone(), group)
                gradients[name] = (gradient.numpy(), parameter.partition_dim if parameter.tensor_model_parallel else None)
        assert layer.weight.grad is None
        return output.detach().numpy(), inputs.grad.numpy(), gradients


def _by_torch(kind, *, row, biased):
    weight, b = _values((OUTPUTS, INPUTS), 1), torch.nn.Parameter(_values((OUTPUTS, 4), 4))
    a = torch.empty(4, INPUTS)
    torch.nn.init.kaiming_uniform_(a, a=5**0.5, generator=torch.Generator().manual_seed(3))
    a = torch.nn.Parameter(a)
    bias = _values((OUTPUTS,), 2) if biased else None
    inputs = _values((SEQUENCE, BATCH, INPUTS), 5).requires_grad_()
    magnitude = torch.nn.Parameter(weight.norm(dim=1))
    merged = weight + SCALE * b @ a
    if kind == "DoRA":
        merged = (magnitude / merged.norm(dim=1).detach())[:, None] * merged
    output = torch.nn.functional.linear(inputs, merged, bias)
    output.backward(_values((SEQUENCE, BATCH, OUTPUTS), 6))
    gradients = {
        "adapter.linear_in.weight": a.grad,
        "adapter.linear_out.weight": b.grad,
        "adapter.weight_magnitude": magnitude.grad,
    }
    return output.detach(), inputs.grad, {name: gradient for name, gradient in gradients.items() if gradient is not None}


@pytest.mark.parametrize("row", [False, True], ids=["column", "row"])
@pytest.mark.parametrize("kind", ["LoRA", "DoRA"])
def test_a_divided_expert_is_that_of_torch_merged(kind, row, ranks, model_folder):
    """megatron-core's token dispatcher sums what a divided expert answers, and the gradients of what it is given."""
    first, second = ranks.run(_through, 2, str(model_folder("gqa")), kind, row, False, True)
    output, for_input, gradients = (torch.from_numpy(part) if number < 2 else part for number, part in enumerate(first))
    others, more = (torch.from_numpy(part) for part in second[:2])
    parts = [
        (output + others if row else torch.cat((output, others), 2)),
        torch.cat((for_input, more), 2) if row else for_input + more,
    ]
    _check(parts, [gradients, second[2]], *_by_torch(kind, row=row, biased=False))


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["whole", "sequence"])
@pytest.mark.parametrize("row", [False, True], ids=["column", "row"])
@pytest.mark.parametrize("kind", ["LoRA", "DoRA"])
def test_a_divided_layer_is_that_of_torch_merged(kind, row, sequence_parallel, ranks, model_folder):
    parts = ranks.run(_through, 2, str(model_folder("gqa")), kind, row, sequence_parallel)

    def joined(number, axis):
        tensors = [torch.from_numpy(part[number]) for part in parts]
        return tensors[0] if axis is None else torch.cat(tensors, dim=axis)

    axes = (0 if sequence_parallel else None) if row else 2, 2 if row else 0 if sequence_parallel else None
    _check(
        [joined(number, axis) for number, axis in enumerate(axes)],
        [part[2] for part in parts],
        *_by_torch(kind, row=row, biased=not row),
    )


def _check(actual, gradients, *expected):
    """Output and gradient of the input, and the gradients of parameters by rank, against the whole ones."""
    output, for_input, each = expected
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(actual[0], output, **close)
    torch.testing.assert_close(actual[1], for_input, **close)
    assert gradients[0].keys() == each.keys()
    for name, gradient in each.items():
        axis = gradients[0][name][1]
        parts = [torch.from_numpy(rank[name][0]) for rank in gradients]
        for part in parts if axis is None else [torch.cat(parts, dim=axis)]:
            torch.testing.assert_close(part, gradient, **close)


def _dropped(folder, row, sequence_parallel):
    from megatron.core import parallel_state

    from trainer import parallel, peft

    with parallel.session(small.settings(Path(folder), model__tensor_model_parallel_size=2), "cpu"):
        layer = _layer(peft.LoRA(dim=4, dropout=0.5), row=row, sequence_parallel=sequence_parallel)
        dropped = layer.adapter._apply_dropout(torch.ones(SEQUENCE, BATCH, 8))
        assert parallel_state.get_tensor_model_parallel_world_size() == 2
        layer.eval()
        return dropped.numpy(), layer.adapter._apply_dropout(torch.ones(2)).numpy()


@pytest.mark.parametrize(("row", "sequence_parallel"), [(False, False), (True, False), (False, True), (True, True)])
def test_ranks_drop_the_same_of_the_same_and_each_its_own_of_parts(row, sequence_parallel, ranks, model_folder):
    (first, kept), (second, _) = ranks.run(_dropped, 2, str(model_folder("gqa")), row, sequence_parallel)
    assert set(first.flatten()) == {0.0, 2.0}
    assert (first == second).all() == (not row and not sequence_parallel)
    assert (kept == 1).all()


class TELayerNormColumnParallelLinear(torch.nn.Linear):
    """Answers as megatron-core's of this name over Transformer Engine, which this machine has not, by their source."""

    return_layernorm_output = False

    def __init__(self, inputs, outputs, *, returns_bias):
        super().__init__(inputs, outputs)
        self.te_return_bias = returns_bias

    def forward(self, layer_input):
        normed = torch.nn.functional.rms_norm(layer_input, layer_input.shape[-1:])
        output = torch.nn.functional.linear(normed, self.weight, None if self.te_return_bias else self.bias)
        more = (normed,) if self.return_layernorm_output else ()
        if self.te_return_bias:
            return output, self.bias, *more
        return (output, *more) if more else output, None


def _fused_norm(folder, returns_bias):
    from trainer import parallel, peft

    with parallel.session(small.settings(Path(folder)), "cpu"):
        torch.manual_seed(1)
        layer = TELayerNormColumnParallelLinear(INPUTS, OUTPUTS, returns_bias=returns_bias)
        inputs = _values((SEQUENCE, BATCH, INPUTS), 5)
        before, bias = layer(inputs)
        layer = peft.LoRA(dim=4, alpha=8).transform(layer, "decoder.layers.0.mlp.linear_x")
        layer.adapter.linear_in.weight.data.normal_()
        layer.adapter.linear_out.weight.data.normal_()
        after, same = layer(inputs)
        assert same is bias
        normed = torch.nn.functional.rms_norm(inputs, inputs.shape[-1:])
        a, b = layer.adapter.matrices()
        torch.testing.assert_close(after, before + SCALE * normed @ a.T @ b.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("returns_bias", [False, True])
def test_the_adapter_of_a_layer_with_a_norm_in_it_sees_what_the_norm_made(returns_bias, ranks, model_folder):
    ranks.run(_fused_norm, 1, str(model_folder("gqa")), returns_bias)


def test_a_product_is_added_in_place_with_the_gradients_of_torch():
    from trainer.peft.fused_add import FusedAdd

    def inputs():
        torch.manual_seed(1)
        return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 2, 5), (3, 2, 4), (5, 4))]

    def added(output, hidden, weight):
        return FusedAdd.apply(output.clone(), hidden, weight)

    assert torch.autograd.gradcheck(added, inputs())
    output, hidden, weight = inputs()
    before = (output * 1).detach()
    total = FusedAdd.apply(before, hidden, weight)
    torch.testing.assert_close(total, output + hidden @ weight.T)
    assert total.data_ptr() == before.data_ptr()
