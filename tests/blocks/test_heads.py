"""A second head, the discriminator of what it predicts, and how that is frozen."""

import pytest
import torch
import torch.nn.functional as F
from test_networks import network
from torch import nn

from nnunet_ssl.blocks.heads import Discriminator, DistanceHead
from nnunet_ssl.blocks.networks import frozen


@pytest.mark.parametrize("kind", ["plain", "residual"])
@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("deep", [False, True])
def test_a_distance_head_reads_the_last_features_and_leaves_the_output_as_it_is(kind, dim, deep):
    net = network(kind, dim, deep=deep)
    names = set(net.state_dict())
    head, features = DistanceHead(net, 2), []
    assert set(head.state_dict()) == {"head.weight", "head.bias"}
    assert set(net.state_dict()) == names
    net.decoder.stages[-1].register_forward_hook(lambda _, __, output: features.append(output))
    image = torch.randn(2, 1, *[8] * dim)
    expected = net(image)
    output, distances = head(net.encoder(image))
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(distances, head.head(features[0]).tanh())
    assert distances.shape == (2, 2, *[8] * dim)
    distances.sum().backward()
    assert all(p.grad is not None for p in net.encoder.parameters())


@pytest.mark.parametrize("patch_size", [(16, 16, 16), (1, 16, 16), (3, 5, 40), (2, 2, 2), (16, 24), (1, 33)])
def test_a_discriminator_takes_any_patch_and_every_sample_for_itself(patch_size):
    judge = Discriminator(2, 3, patch_size, width=4).eval()
    inputs = [torch.randn(3, channels, *patch_size, requires_grad=True) for channels in (2, 3)]
    verdicts = judge(*inputs)
    assert verdicts.shape == (3, 2)
    for sample in range(3):
        torch.testing.assert_close(judge(*(x[sample : sample + 1] for x in inputs))[0], verdicts[sample])
    verdicts[0].sum().backward()
    for x in inputs:
        assert x.grad[0].abs().sum() > 0
        assert x.grad[1:].abs().sum() == 0


def test_a_discriminator_is_the_released_one():
    judge = Discriminator(1, 1, (32, 32, 32), width=2)
    x, y = torch.randn(2, 2, 1, 32, 32, 32)
    convolutions = [judge.distances, judge.scan, *judge.later]
    assert [(c.in_channels, c.out_channels) for c in convolutions] == [(1, 2), (1, 2), (2, 4), (4, 8), (8, 16)]
    assert all((c.kernel_size, c.stride, c.padding) == ((4,) * 3, (2,) * 3, (1,) * 3) for c in convolutions)
    assert not [m for m in judge.modules() if "Norm" in type(m).__name__]
    torch.manual_seed(3)
    found = judge(x, y)
    torch.manual_seed(3)
    out = F.leaky_relu(judge.distances(x) + judge.scan(y), 0.2)
    for convolution in judge.later:
        out = F.leaky_relu(convolution(F.dropout3d(out, 0.5)), 0.2)
    assert out.shape == (2, 16, 2, 2, 2)
    torch.testing.assert_close(found, judge.verdict(F.adaptive_avg_pool3d(out, 1).flatten(1)))


def test_a_frozen_network_judges_and_learns_nothing():
    judge = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5), nn.Linear(2, 1))
    judge[0].bias.requires_grad_(False)
    x = torch.randn(3, 2, requires_grad=True)
    with frozen(judge):
        assert not any(module.training for module in judge.modules())
        verdict = judge(x).sum()
    assert all(module.training for module in judge.modules())
    assert [p.requires_grad for p in judge.parameters()] == [True, False, True, True]
    verdict.backward()  # after the block, as in a training step
    assert all(p.grad is None for p in judge.parameters())
    assert x.grad.abs().sum() > 0
    with pytest.raises(ZeroDivisionError), frozen(judge.eval()):
        raise ZeroDivisionError
    assert not judge.training
    assert judge[2].weight.requires_grad
