import pytest
import torch
from tiny_trainers import seed

from nnunet_ssl.blocks.perturbations import add_noise, adversarial_direction, in_float32


def test_noise_has_the_deviation_and_is_clipped_at_twice_of_it():
    seed()
    image = torch.full((2, 1, 50, 50, 50), 3.0)
    noise = add_noise(image, 0.1) - 3
    assert noise.abs().max() <= 0.2 + 1e-6
    assert abs(noise.mean()) < 1e-3
    # a normal distribution clipped at two deviations keeps 0.959 of its own
    assert abs(noise.std() - 0.0959) < 1e-3
    assert (image == 3).all()
    assert not torch.equal(noise[0], noise[1])


def test_no_noise_changes_nothing():
    image = torch.randn(2, 1, 4, 4)
    assert add_noise(image, 0.0) is image


def rank_one(vectors, x, scale=1.0):
    """A distance with one direction per sample in which it grows: that of the sample's vector."""
    return lambda changed: scale * ((vectors * (changed - x)).flatten(1).sum(1) ** 2).sum()


@pytest.mark.parametrize("scale", [1.0, 1e-25, 1e25])
def test_the_direction_is_that_in_which_the_distance_grows(scale):
    seed()
    vectors, x = torch.randn(2, 3, 2, 4, 5, 6)
    vectors[0] *= 1000  # every sample has its own direction of the same length
    found = adversarial_direction(rank_one(vectors, x, scale), x, 0.01)
    expected = vectors / vectors.square().flatten(1).mean(1).sqrt().view(-1, 1, 1, 1, 1)
    sign = (found * expected).flatten(1).sum(1).sign().view(-1, 1, 1, 1, 1)
    torch.testing.assert_close(found, sign * expected, rtol=1e-3, atol=1e-3)


def test_its_length_does_not_depend_on_the_size_of_the_patch():
    for size in (4, 32):
        x = torch.randn(2, 1, size, size, size)
        found = adversarial_direction(rank_one(torch.randn_like(x), x), x, 0.01)
        torch.testing.assert_close(found.square().flatten(1).mean(1), torch.ones(2))


def test_the_gradient_is_taken_at_the_probe():
    seen, x = [], torch.randn(2, 1, 4, 4)

    def distance(changed):
        seen.append(changed.detach() - x)
        return changed.square().sum()

    adversarial_direction(distance, x, torch.tensor([0.01, 0.5]).view(2, 1, 1, 1))
    (noise,) = seen
    torch.testing.assert_close(noise.square().flatten(1).mean(1).sqrt(), torch.tensor([0.01, 0.5]), rtol=1e-4, atol=0)
    assert (noise[0] > 0).any()
    assert (noise[0] < 0).any()


def test_without_a_gradient_it_is_zero():
    x = torch.randn(2, 1, 4, 4)
    found = adversarial_direction(lambda changed: (changed[1] * changed[1]).sum() + 0 * changed.sum(), x, 0.01)
    assert (found[0] == 0).all()
    assert found[1].square().mean().sqrt() == pytest.approx(1)


def test_parts_have_the_direction_of_their_sum_and_one_graph_at_a_time():
    x, vectors = torch.randn(2, 1, 4, 4), torch.randn(2, 2, 1, 4, 4)
    first, second = (rank_one(own, x) for own in vectors)

    def parts(changed):
        part = first(changed)
        yield part
        with pytest.raises(RuntimeError, match="second time"):  # its graph is gone
            torch.autograd.grad(part, changed)
        yield second(changed)

    seed()
    found = adversarial_direction(parts, x, 0.01)
    seed()
    torch.testing.assert_close(found, adversarial_direction(lambda changed: first(changed) + second(changed), x, 0.01))


def test_half_precision_without_gradients_changes_nothing_and_no_weight_gets_a_gradient():
    seed()
    network, x = torch.nn.Conv2d(1, 2, 3), torch.randn(2, 1, 8, 8)
    for parameter in network.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)

    def found():
        seed()
        with torch.no_grad(), in_float32(x.device):
            target = network(x)
        assert target.dtype == torch.float32
        return adversarial_direction(lambda changed: (network(changed) - target).square().sum(), x, 0.01)

    expected = found()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert network(x).dtype == torch.bfloat16
        assert torch.equal(found(), expected)
        assert not torch.is_grad_enabled()
        assert torch.is_autocast_enabled("cpu")
    assert not expected.requires_grad
    assert all((parameter.grad == 3).all() for parameter in network.parameters())


def test_an_image_with_a_gradient_gets_none():
    x = torch.randn(1, 1, 4, 4, requires_grad=True)
    found = adversarial_direction(lambda changed: changed.square().sum(), x, 0.01)
    assert not found.requires_grad
    assert x.grad is None
