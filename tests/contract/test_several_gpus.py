"""Training on several GPUs: two processes over gloo here, see two_processes.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_trainers import every_trainer
from two_processes import SAMPLE_WISE, STEPS, joint_batch

from nnunet_ssl.blocks.networks import average_gradients

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def two_processes(tiny_dataset, tmp_path_factory):
    """A folder with the networks of both ranks after their trainings, and the folder of the results."""
    output = tmp_path_factory.mktemp("two_processes")
    (output / "results").mkdir()
    command = [sys.executable, str(Path(__file__).parents[1] / "two_processes.py"), str(tiny_dataset), str(output)]
    environment = {**os.environ, "nnUNet_results": str(output / "results"), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", timeout=900)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return output


def flat(state):
    return torch.cat([tensor.flatten().float() for tensor in state.values()])


@pytest.mark.parametrize("trainer_class", every_trainer())
def test_all_networks_are_equal_on_all_ranks(trainer_class, two_processes):
    files = [two_processes / f"whole_{trainer_class.__name__}_{rank}.pt" for rank in (0, 1)]
    begun = [torch.load(file.with_name("begun_" + file.name)) for file in files]
    assert all(torch.equal(flat(weights), flat(begun[1][name])) for name, weights in begun[0].items() if weights)
    first, second = map(torch.load, files)
    assert first.keys() == second.keys()
    for name in (name for name, weights in first.items() if weights):
        torch.testing.assert_close(flat(first[name]), flat(second[name]), rtol=0, atol=1e-6)
        if name != "student":  # no companion is a copy of the student after three steps
            assert not torch.equal(flat(first[name]), flat(first["student"]))


@pytest.mark.parametrize("trainer_class", every_trainer())
def test_one_rank_writes_the_checkpoint_and_the_losses(trainer_class, two_processes):
    (folder,) = two_processes.glob(f"results/*/{trainer_class.__name__}__nnUNetPlans__3d_fullres/fold_0")
    state = torch.load(folder / "checkpoint_final.pth", weights_only=False)
    saved = torch.load(two_processes / f"whole_{trainer_class.__name__}_0.pt")
    assert state["nnunet_ssl"]["step"] == STEPS
    assert torch.equal(flat(state["nnunet_ssl"]["student"]), flat(saved["student"]))
    _, *rows = (folder / "losses.csv").read_text(encoding="utf-8").split()
    assert len(rows) == 1
    assert all(torch.isfinite(torch.tensor(float(value))) for value in rows[0].split(","))


@pytest.mark.parametrize("trainer_class", every_trainer())
def test_resumed_ranks_have_the_same_networks_and_their_own_random_numbers(trainer_class, two_processes):
    name = trainer_class.__name__
    first, second = (torch.load(two_processes / f"resumed_whole_{name}_{rank}.pt") for rank in (0, 1))
    before = torch.load(two_processes / f"whole_{name}_0.pt")
    for network in (network for network, weights in first.items() if weights):
        torch.testing.assert_close(flat(first[network]), flat(second[network]), rtol=0, atol=1e-6)
    assert not torch.equal(flat(first["student"]), flat(before["student"]))
    # the same random numbers would give the same crops and masks
    random = [torch.load(two_processes / f"random_whole_{name}_{rank}.pt") for rank in (0, 1)]
    assert not torch.equal(*random)


def test_both_phases_leave_the_ranks_equal(two_processes):
    epochs = [[torch.load(two_processes / f"phase_{epoch}_{rank}.pt") for rank in (0, 1)] for epoch in (0, 1, 2)]
    for first, second in epochs:
        for name in first:
            torch.testing.assert_close(flat(first[name]), flat(second[name]), rtol=0, atol=1e-6)
    beginning, boundary, end = (flat(first["student"]) for first, _ in epochs)
    assert not torch.equal(beginning, boundary)
    assert not torch.equal(boundary, end)
    other = [flat(first["student_2"]) for first, _ in epochs]
    assert torch.equal(other[1], boundary)  # the second student begins as a copy, and is trained
    assert not torch.equal(other[2], end)
    assert not torch.equal(other[2], other[1])


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])  # nnU-Net's Dice: of the batch, of a sample
@pytest.mark.parametrize("trainer_class", [t for t in every_trainer() if t.__name__ in SAMPLE_WISE])
def test_two_ranks_train_as_one_process_with_the_joint_batch(
    trainer_class, configuration, two_processes, tiny_dataset, tmp_path
):
    joint_batch(trainer_class, configuration, tiny_dataset, tmp_path / "one.pt", rank=0, world_size=1)
    expected = torch.load(tmp_path / "one.pt")
    for rank in (0, 1):
        networks = torch.load(two_processes / f"joint_{trainer_class.__name__}_{configuration}_{rank}.pt")
        assert networks.keys() == expected.keys()
        for name in networks:
            torch.testing.assert_close(flat(networks[name]), flat(expected[name]), rtol=0, atol=1e-6)


def test_gradients_are_averaged_in_one_exchange(monkeypatch):
    network = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1), torch.nn.Linear(1, 1))
    for index, parameter in enumerate([*network[0].parameters(), *network[1].parameters()]):
        parameter.grad = torch.full_like(parameter, float(index))  # the last layer has none
    calls = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x: (calls.append(len(x)), x.add_(1)))  # sum: x + 1
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    average_gradients([network])
    assert calls == [6 + 3 + 3 + 1]
    for index, parameter in enumerate([*network[0].parameters(), *network[1].parameters()]):
        assert (parameter.grad == (index + 1) / 2).all()
    assert network[2].weight.grad is None
