"""What a checkpoint holds beside nnU-Net's own keys, and that its tensors are written once."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from tiny_trainers import make_trainer, seed

from nnunet_ssl.data.splits import save_splits
from nnunet_ssl.trainers.nnUNetTrainerCoLearning import nnUNetTrainerCoLearning
from nnunet_ssl.trainers.nnUNetTrainerM3HL import nnUNetTrainerM3HL
from nnunet_ssl.trainers.nnUNetTrainerMeanTeacher import nnUNetTrainerMeanTeacher
from nnunet_ssl.training.checkpoints import CHECKPOINT_KEY, is_finite

TRAINERS = [nnUNetTrainerM3HL, nnUNetTrainerCoLearning]  # with a teacher; with a second student and a teacher


@pytest.fixture(params=TRAINERS, ids=lambda trainer: trainer.__name__)
def trainer(request, tiny_dataset):
    """A trainer with momentum and one logged value, as after an epoch."""
    seed()
    trainer = make_trainer(request.param, tiny_dataset)
    trainer.initialize()
    for network in trainer.trained_networks():
        for parameter in network.parameters():
            parameter.grad = torch.randn_like(parameter)
    trainer.optimizer.step()
    trainer.logger.local_logger.my_fantastic_logging["mean_fg_dice"].append(0.0)
    return trainer


def load(file: Path) -> dict:
    return torch.load(file, weights_only=False)


def assert_same(a, b) -> None:
    """Equal to the last bit, in nested dicts and lists."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def test_it_is_stock_nnunets_with_ours_under_one_key(trainer, tmp_path):
    nnUNetTrainer.save_checkpoint(trainer, str(tmp_path / "stock.pth"))
    trainer.save_checkpoint(str(tmp_path / "ours.pth"))
    stock, written = load(tmp_path / "stock.pth"), load(tmp_path / "ours.pth")
    ours = written.pop(CHECKPOINT_KEY)
    whole = stock["optimizer_state"]  # stock nnU-Net writes all groups, and has one itself
    first = whole["param_groups"][0]
    stock["optimizer_state"] = {"state": {n: whole["state"][n] for n in first["params"]}, "param_groups": [first]}
    deployed = ours["inference_network"]
    stock["network_weights"] = {"student": ours["student"], **ours["companions"]}[deployed]
    assert_same(written, stock)
    assert_same(ours["optimizer"], whole)
    assert_same(ours["student"], trainer.network.state_dict())
    companions = {name: network.state_dict() for name, network in vars(trainer.companions).items()}
    assert_same(ours["companions"], companions)
    assert len(whole["state"]) == sum(len(list(n.parameters())) for n in trainer.trained_networks())
    # afterwards the states are whole again
    assert_same(trainer.optimizer.state_dict(), whole)


def test_keys_that_nnunet_adds_are_kept(trainer, tmp_path, monkeypatch):
    def save_checkpoint(self, file):
        weights, optimizer = self.network.state_dict(), self.optimizer.state_dict()
        parameters = sum(p.numel() for p in self.network.parameters())
        torch.save({"network_weights": weights, "optimizer_state": optimizer, "parameters": parameters}, file)

    monkeypatch.setattr(nnUNetTrainer, "save_checkpoint", save_checkpoint)
    trainer.save_checkpoint(str(tmp_path / "c.pth"))
    written = load(tmp_path / "c.pth")
    assert written.keys() == {"network_weights", "optimizer_state", "parameters", CHECKPOINT_KEY}
    assert written["parameters"] == sum(p.numel() for p in trainer.network.parameters()) > 0


def test_every_tensor_is_serialised_once(trainer, tmp_path, monkeypatch):
    written = []
    save = torch.save

    def counting(checkpoint, file):
        save(checkpoint, file)
        written.append(file.tell() if hasattr(file, "tell") else Path(file).stat().st_size)

    monkeypatch.setattr(torch, "save", counting)
    trainer.save_checkpoint(str(tmp_path / "c.pth"))
    size = (tmp_path / "c.pth").stat().st_size
    network = sum(p.numel() * p.element_size() for p in trainer.network.parameters())
    assert size > network * (1 + len(vars(trainer.companions)) + len(trainer.trained_networks()))  # with momentum
    assert sum(written) - size < network / 2  # beside the file: nnU-Net's other keys


def test_the_states_are_whole_again_after_a_failure(trainer, tmp_path, monkeypatch):
    path = tmp_path / "c.pth"
    names, optimizer = list(trainer.network.state_dict()), trainer.optimizer.state_dict()
    trainer.save_checkpoint(str(path))
    earlier = path.read_bytes()

    def broken(checkpoint, file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", broken)  # of nnU-Net, before anything is written
    with pytest.raises(OSError, match="No space"):
        trainer.save_checkpoint(str(path))
    assert path.read_bytes() == earlier
    assert [p.name for p in tmp_path.iterdir()] == ["c.pth"]
    assert list(trainer.network.state_dict()) == names
    assert_same(trainer.optimizer.state_dict(), optimizer)


def test_a_failure_half_way_through_the_file_keeps_the_earlier_one(trainer, tmp_path, monkeypatch):
    path = tmp_path / "c.pth"
    trainer.save_checkpoint(str(path))
    earlier = path.read_bytes()
    save = torch.save

    def full_disk(checkpoint, file):
        save(checkpoint, file)
        if CHECKPOINT_KEY in checkpoint:
            Path(file).write_bytes(Path(file).read_bytes()[:100])
            raise RuntimeError("unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match=r"c\.pth could not be written .* Is the disk full\?"):
        trainer.save_checkpoint(str(path))
    assert path.read_bytes() == earlier
    assert [p.name for p in tmp_path.iterdir()] == ["c.pth"]


@pytest.mark.parametrize(
    ("values", "finite"),
    [
        ([1.0, -2.0], True),
        ([], True),
        ([3e38, 3e38], True),  # their sum is infinite
        ([float("inf"), 1.0], False),
        ([float("inf"), -float("inf")], False),
        ([1.0, float("nan")], False),
    ],
)
def test_is_finite(values, finite):
    assert is_finite(torch.tensor(values)) is finite
    assert is_finite(torch.tensor(7))  # a step counter


def test_a_training_is_not_continued_with_labels_that_are_hidden_since(tiny_dataset):
    splits = tiny_dataset / "splits_final.json"
    text = splits.read_text(encoding="utf-8")
    trainer = make_trainer(nnUNetTrainerMeanTeacher, tiny_dataset)
    trainer.on_train_start()
    trainer.save_checkpoint(file := str(Path(trainer.output_folder) / "checkpoint_latest.pth"))
    [fold] = json.loads(text)
    hidden = fold["train"][-1]
    try:
        save_splits(splits, [fold | {"train": fold["train"][:-1], "unlabeled": [*fold["unlabeled"], hidden]}], True)
        with pytest.raises(ValueError, match=f"hides or validates on now: the labels of {hidden}"):
            make_trainer(nnUNetTrainerMeanTeacher, tiny_dataset).load_checkpoint(file)
        save_splits(splits, [fold], True)
        make_trainer(nnUNetTrainerMeanTeacher, tiny_dataset).load_checkpoint(file)
    finally:
        for backup in splits.parent.glob("splits_final.json.bak*"):
            backup.unlink()
        splits.write_text(text)


def test_a_checkpoint_is_never_half_an_hour_old(tiny_dataset, monkeypatch):
    """A job that a cluster ends after some hours has to get beyond nnU-Net's 50 epochs."""
    clock, saved = SimpleNamespace(monotonic=lambda: clock.now, now=0.0), []
    monkeypatch.setattr("nnunet_ssl.trainer.time", clock)
    trainer = make_trainer(nnUNetTrainerMeanTeacher, tiny_dataset, num_epochs=6)
    assert trainer.save_every == 50
    step, save = trainer.train_step, trainer.save_checkpoint

    def slow_step(batch):
        clock.now += 1000 / trainer.num_iterations_per_epoch
        return step(batch)

    def recorded(filename):
        save(filename)
        if "latest" in filename:
            saved.append(load(filename)["current_epoch"])

    trainer.train_step, trainer.save_checkpoint = slow_step, recorded
    trainer.run_training()
    assert saved == [2, 4]  # the next epoch of each; the last one has checkpoint_final
    assert trainer.save_every == 50
