"""Mamba layers without Mamba's kernels: the arithmetic of transformers' layer, with its gradients, wherever a layer is."""

from __future__ import annotations

import pytest
import torch

from tests.trainer.layers import passes

SIZES = {"mamba_state_dim": 8, "mamba_head_dim": 4, "mamba_num_groups": 2, "mamba_num_heads": 8, "mamba_norm_epsilon": 0.1}
FIELDS = {"layout": "hybrid", "hybrid_layer_pattern": "M*M-", **SIZES}


def test_outputs_of_a_scan_are_those_of_the_recurrence_whatever_its_chunks_are():
    from trainer.layers.state_space import scan

    torch.manual_seed(0)
    inputs, steps, decay = torch.randn(2, 11, 4, 3), torch.rand(2, 11, 4), -torch.rand(4) * 8
    enters, leaves = torch.randn(2, 2, 11, 2, 5)
    state, outputs = torch.zeros(2, 4, 3, 5), []
    for token in range(11):
        into, out = (each[:, token].repeat_interleave(2, dim=1) for each in (enters, leaves))
        state = state * torch.exp(steps[:, token] * decay)[..., None, None]
        state = state + (steps[:, token, :, None] * inputs[:, token])[..., None] * into[:, :, None]
        outputs.append((state * out[:, :, None]).sum(-1))
    for chunk in (1, 4, 11, 16):
        torch.testing.assert_close(scan(inputs, steps, decay, enters, leaves, chunk=chunk), torch.stack(outputs, 1))


def _mixer(tokens: int):
    """Outputs and gradients of transformers' mixer and of ours with its weights, on this rank."""
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    from trainer import model, parallel
    from trainer.config import RunConfig
    from trainer.model import GPTModelProvider
    from trainer.settings.resolve import resolve

    config = RunConfig(model=GPTModelProvider(**{**passes.SMALL, **FIELDS}), mixed_precision="fp32")
    config.dataset.sequence_length, config.optimizer.lr = passes.SEQUENCE, 1e-4
    config = resolve(config, world_size=1, device="cpu").config
    torch.manual_seed(1)
    names = {"layer_norm_epsilon": 0.1, "state_size": 8, "head_dim": 4, "n_groups": 2, "num_heads": 8}
    theirs = Mamba2Mixer(Mamba2Config(hidden_size=32, expand=1, chunk_size=16, **names, use_conv_bias=True), 0).float()
    with parallel.session(config, "cpu"):
        ours = model.build(config.model)[0].decoder.layers[0].mixer
        ours.chunk_size = 16
        assert ours.norm.eps == theirs.norm.variance_epsilon == 0.1
        weights = {name.replace("conv1d_", "conv1d."): parameter for name, parameter in ours.named_parameters()}
        for name, parameter in theirs.named_parameters():
            parameter.data.normal_(0.1, 0.3)
            weights[name].data.copy_(parameter.data)
        states = torch.randn(2, tokens, 32)
        results = []
        for output, own in (
            (theirs(states), dict(theirs.named_parameters())),
            (ours(states.transpose(0, 1))[0].transpose(0, 1), weights),
        ):
            output.square().sum().backward()
            results.append((output.detach(), {name: own[name].grad for name in weights}))
        return results


@pytest.mark.parametrize("tokens", [16, 40, 7])
def test_a_mixer_is_that_of_transformers(tokens, ranks):
    ((theirs, their_gradients), (ours, gradients)) = ranks.run(_mixer, 1, tokens)[0]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert set(gradients) == set(their_gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, their_gradients[name], atol=1e-4, rtol=1e-4, msg=name)
