"""What only a GPU can show; skipped where there is none."""

import pytest
import torch
from tiny_trainers import every_trainer, make_trainer, seed

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def on_gpu(trainer_class, dataset):
    seed()
    trainer = make_trainer(trainer_class, dataset)
    trainer.device = torch.device("cuda", 0)
    trainer.grad_scaler = torch.amp.GradScaler("cuda")
    return trainer


@pytest.mark.parametrize("compiled", ["0", "1"])
@pytest.mark.parametrize("trainer_class", every_trainer())
def test_training_validation_and_resuming(trainer_class, compiled, tiny_dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_compile", compiled)
    torch._dynamo.reset()
    trainer = on_gpu(trainer_class, tiny_dataset)
    trainer.run_training()
    trainer.perform_actual_validation()
    networks = {"student": trainer.network, **vars(trainer.companions)}
    assert all(p.is_cuda and p.isfinite().all() for network in networks.values() for p in network.parameters())

    trainer.current_epoch -= 1  # as in a training that goes on
    file = str(tmp_path / "checkpoint.pth")
    trainer.save_checkpoint(file)
    resumed = on_gpu(trainer_class, tiny_dataset)
    resumed.load_checkpoint(file)
    others = {"student": resumed.network, **vars(resumed.companions)}
    for name, network in networks.items():
        assert all(torch.equal(a, b) for a, b in zip(network.parameters(), others[name].parameters(), strict=True))
    resumed.on_train_start()
    resumed.on_train_epoch_start()
    assert torch.isfinite(torch.tensor(resumed.train_step(next(resumed.dataloader_train))["loss"]))
