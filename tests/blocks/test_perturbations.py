import torch
from tiny_trainers import seed

from nnunet_ssl.blocks.perturbations import add_noise


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
