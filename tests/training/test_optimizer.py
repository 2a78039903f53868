"""The update of weights by several optimizers."""

import pytest
import torch
from torch import nn

from nnunet_ssl.training import checkpoints
from nnunet_ssl.training.optimizer import accumulate_gradients, adam, add_networks, update_weights


def networks_and_optimizers():
    networks = [nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)]
    for network in networks:
        nn.init.ones_(network.weight)
    return networks, [torch.optim.SGD(network.parameters(), lr=1.0) for network in networks]


def scaler():
    return torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1)


@pytest.mark.parametrize("scaled", [False, True])
def test_all_optimizers_step_with_gradients_that_are_unscaled_and_clipped(scaled):
    networks, optimizers = networks_and_optimizers()
    grad_scaler = scaler() if scaled else None
    scale = grad_scaler.scale(torch.ones(())).item() if scaled else 1.0
    for network, gradient in zip(networks, (0.25, -3.0), strict=True):
        network.weight.grad = torch.full((1, 1), gradient * scale)
    update_weights(optimizers, networks, 0.5, grad_scaler)
    assert [network.weight.item() for network in networks] == pytest.approx([0.75, 1.5], abs=1e-5)
    if scaled:
        assert grad_scaler.get_scale() == 8.0  # raised once


@pytest.mark.parametrize("scaled", [False, True])
def test_an_optimizer_without_gradients_takes_no_step(scaled):
    networks, optimizers = networks_and_optimizers()
    grad_scaler = scaler() if scaled else None
    networks[0].weight.grad = torch.full((1, 1), 4.0)
    if scaled:
        grad_scaler.scale(torch.ones(()))
    update_weights(optimizers, networks, 12, grad_scaler)
    assert networks[1].weight.item() == 1
    assert networks[0].weight.item() == pytest.approx(0.0 if scaled else -3.0)


@pytest.mark.parametrize("lost", [0, 1])
def test_a_gradient_that_is_not_finite_costs_its_optimizer_the_step_and_lowers_the_scale(lost):
    networks, optimizers = networks_and_optimizers()
    grad_scaler = scaler()
    grad_scaler.scale(torch.ones(()))
    for index, network in enumerate(networks):
        network.weight.grad = torch.full((1, 1), torch.inf if index == lost else 1.0)
    update_weights(optimizers, networks, 12, grad_scaler)
    assert networks[lost].weight.item() == 1
    assert networks[1 - lost].weight.item() == 0.75
    assert grad_scaler.get_scale() == 2.0
    for index, network in enumerate(networks):  # on a CPU without a scaler, none steps
        network.weight.grad = torch.full((1, 1), torch.nan if index == lost else 1.0)
    update_weights(optimizers, networks, 12, None)
    assert networks[lost].weight.item() == 1
    assert networks[1 - lost].weight.item() == 0.75


def test_what_another_optimizer_trains_is_not_added():
    first, head, judge, teacher = (nn.Linear(1, 1) for _ in range(4))
    teacher.requires_grad_(False)
    optimizer = torch.optim.SGD(first.parameters(), lr=1.0)
    add_networks(optimizer, [head, judge, teacher], [adam(judge, 1e-4, (0.9, 0.99))])
    assert [group["params"] for group in optimizer.param_groups] == [[*first.parameters()], [*head.parameters()]]


def test_terms_of_several_graphs_add_up_and_a_later_one_is_not_asked_for_before_an_earlier_one_is_done():
    weight, order = torch.ones((), requires_grad=True), []
    weight.register_hook(lambda gradient: order.append(gradient.item()))

    def losses():
        yield {"a": 2 * weight, "b": 3 * weight}
        order.append("next")
        yield {}
        yield {"a": 4 * weight}

    terms = accumulate_gradients(losses(), torch.enable_grad, None)
    assert {name: value.item() for name, value in terms.items()} == {"a": 6.0, "b": 3.0}
    assert not any(value.requires_grad for value in terms.values())
    assert order == [5.0, "next", 4.0]
    assert weight.grad == 9


def test_a_restored_optimizer_keeps_its_own_settings():
    network = nn.Linear(1, 1)
    state = {"student": network.state_dict(), "companions": {}}
    sgd = torch.optim.SGD(network.parameters(), lr=1.0)
    saved, other = adam(network, 1e-4, (0.9, 0.99)), adam(network, 1e-3, (0.9, 0.99))
    network(torch.ones(1, 1)).sum().backward()
    saved.step()
    on_gpu = saved.state_dict()
    on_gpu["param_groups"][0]["fused"] = True  # where a fused one was saved on a GPU, and goes on without
    state |= {"optimizer": sgd.state_dict(), "optimizers": {"judge": on_gpu}}
    checkpoints.restore(state, {"student": network}, sgd, {"judge": other})
    assert other.param_groups[0]["lr"] == 1e-3
    assert not other.param_groups[0]["fused"]
    for parameter in network.parameters():
        assert other.state[parameter]["step"] == 1
        assert torch.equal(other.state[parameter]["exp_avg"], saved.state[parameter]["exp_avg"])
