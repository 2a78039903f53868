"""torch.compile, nnU-Net's default on CUDA: what runs compiled, and that it computes the same.

nnU-Net does not compile on a CPU; here it is told to.
"""

import shutil
import sys
import sysconfig
from copy import deepcopy
from functools import partial
from pathlib import Path

import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from tiny_trainers import EVERY_STREAM, every_trainer, make_trainer, seed
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule
from torch._dynamo.utils import counters

from nnunet_ssl.blocks.networks import compile_in_place, frozen_copy
from nnunet_ssl.trainers.nnUNetTrainerCoLearning import nnUNetTrainerCoLearning
from nnunet_ssl.trainers.nnUNetTrainerM3HL import nnUNetTrainerM3HL
from nnunet_ssl.trainers.nnUNetTrainerMeanTeacher import nnUNetTrainerMeanTeacher

COMPILER = shutil.which("g++") is not None and Path(sysconfig.get_paths()["include"], "Python.h").is_file()
CONVOLUTIONS = {module.forward.__code__ for module in (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)}
NETWORKS = [("tiny_dataset", "3d_fullres"), ("tiny_dataset", "2d"), ("tiny_residual_dataset", "3d_fullres")]


@pytest.fixture
def compiling(monkeypatch):
    """Switches compilation on or off for trainers that are initialized from then on."""
    monkeypatch.setenv("TORCH_WARM_POOL", "0")  # a process that compiles for GPUs
    torch._dynamo.reset()
    counters.clear()
    yield lambda on: monkeypatch.setattr(nnUNetTrainer, "_do_i_compile", lambda self: on)
    torch._dynamo.reset()


@pytest.fixture
def without_code(monkeypatch):
    """Networks are traced and differentiated as ever, but no C++ is made of that, which takes most of the time."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))


def started(trainer_class, dataset, configuration):
    seed()
    trainer = make_trainer(trainer_class, dataset, configuration, num_iterations_per_epoch=100, **EVERY_STREAM)
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    return trainer


def steps(trainer, batch):
    """Losses of two steps in every phase, and how many convolutions of the second ones were not compiled."""
    losses, eager = [], 0

    def count(frame, event, _):
        nonlocal eager
        eager += event == "call" and frame.f_code in CONVOLUTIONS

    for begin in (0, trainer.max_steps // 2, trainer.max_steps - 3):
        trainer.step = begin
        for number in range(2):
            seed(begin + number)
            sys.setprofile(count if number else None)
            try:
                losses.append(float(trainer.train_step(deepcopy(batch))["loss"]))
            finally:
                sys.setprofile(None)
    return losses, eager


def both(trainer_class, dataset, configuration, compiling):
    """The trainer that was compiled, after its steps, with the losses of the one that was not."""
    found = []
    for on in (False, True):
        compiling(on)
        trainer = started(trainer_class, dataset, configuration)
        batch = next(trainer.dataloader_train)
        found.append(steps(trainer, batch))
    (expected, every), (losses, eager) = found
    assert every > 0
    return trainer, batch, eager, (losses, expected)


@pytest.mark.parametrize("trainer_class", every_trainer())
def test_every_network_is_compiled_and_computes_the_same(
    trainer_class, tiny_dataset, compiling, without_code, tmp_path
):
    trainer, batch, eager, (losses, expected) = both(trainer_class, tiny_dataset, "3d_fullres", compiling)
    assert not isinstance(trainer.network, OptimizedModule)  # which would change the names of the weights
    assert eager == 0
    assert not counters["graph_break"]
    assert losses == pytest.approx(expected, rel=2e-3, abs=2e-3)
    for name in ("mean_fg_dice", "ema_fg_dice"):
        trainer.logger.local_logger.my_fantastic_logging[name].append(0.5)
    file = tmp_path / "checkpoint.pth"
    trainer.save_checkpoint(str(file))
    continued = []
    for on in (True, False):
        compiling(on)
        continued.append(make_trainer(trainer_class, tiny_dataset, num_iterations_per_epoch=100))
        continued[-1].load_checkpoint(str(file))
        continued[-1].on_train_start()
        continued[-1].on_train_epoch_start()
    trainer.current_epoch += 1
    trainer.on_train_epoch_start()  # with the learning rate of the resumed trainings
    after = []
    for each in (trainer, *continued):
        seed(5)
        each.step = trainer.max_steps // 2
        after.append(each.train_step(deepcopy(batch))["loss"])
    assert after[0] == after[1] == pytest.approx(after[2], rel=2e-3, abs=2e-3)
    resumed = continued[0]
    for name, network in {"student": trainer.network, **vars(trainer.companions)}.items():
        other = resumed.network if name == "student" else getattr(resumed.companions, name)
        assert all(torch.equal(one, two) for one, two in zip(network.parameters(), other.parameters(), strict=True))


@pytest.mark.slow
@pytest.mark.skipif(not COMPILER, reason="torch.compile needs a C++ compiler, g++, and Python's headers")
@pytest.mark.parametrize(
    ("trainer_class", "fixture", "configuration"),
    [(nnUNetTrainerCoLearning, *NETWORKS[0]), *((nnUNetTrainerM3HL, *network) for network in NETWORKS[1:])],
)
def test_networks_of_every_kind_with_the_real_compiler(trainer_class, fixture, configuration, compiling, request):
    data = request.getfixturevalue(fixture)
    _, _, eager, (losses, expected) = both(trainer_class, data, configuration, compiling)
    assert eager == 0
    assert not counters["graph_break"]
    assert losses == pytest.approx(expected, rel=2e-3, abs=2e-3)


def test_both_phases_of_a_training_are_compiled_and_compute_the_same(tiny_dataset, compiling, without_code):
    settings = {"supervised_part": 0.5, "num_iterations_per_epoch": 100, **EVERY_STREAM}
    found = []
    for on in (False, True):
        compiling(on)
        seed()
        trainer, losses = make_trainer(nnUNetTrainerCoLearning, tiny_dataset, "2d", **settings), []
        trainer.on_train_start()
        for epoch in (0, 1):
            counters.clear()
            trainer.current_epoch = epoch
            trainer.on_train_epoch_start()
            batch = next(trainer.dataloader_train)
            for number in range(2):
                seed(number)
                losses.append(float(trainer.train_step(deepcopy(batch))["loss"]))
            assert (counters["frames"]["ok"] > 0) == on  # the student, then its companions as well
            assert not counters["graph_break"]
        assert trainer.step == 2
        found.append(losses)
    assert found[1] == pytest.approx(found[0], rel=2e-3, abs=2e-3)


class EagerTeacher(nnUNetTrainerMeanTeacher):
    def initialize(self):
        super().initialize()
        self.companions.teacher = frozen_copy(self.network)  # a copy is not compiled


def test_a_teacher_that_is_not_compiled_is_seen(tiny_dataset, compiling, without_code):
    compiling(True)
    trainer = started(EagerTeacher, tiny_dataset, "3d_fullres")
    _, eager = steps(trainer, next(trainer.dataloader_train))
    assert eager > 0


def test_more_versions_of_a_network_than_torch_allows_by_itself_stay_compiled(compiling, without_code, monkeypatch):
    monkeypatch.setattr(torch._dynamo.config, "cache_size_limit", 8)
    networks = [nn.Sequential(nn.Linear(2, 2), nn.Dropout(p / 20)) for p in range(10)]  # as many versions of one code
    for network in networks:
        compile_in_place(network)
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    for network in networks:
        network(torch.zeros(1, 2))
