"""nnU-Net's predictors for any network of a checkpoint, and what they see of a scan."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from torch import nn

from nnunet_ssl.blocks.networks import has_stages, unwrap, with_interpolation
from nnunet_ssl.commands.trained_models import Network, network_weights
from nnunet_ssl.system.quiet import quiet
from nnunet_ssl.training.checkpoints import read_checkpoint


def load_predictors(networks: Sequence[Network], device: str, mirroring: bool) -> list[nnUNetPredictor]:
    """nnU-Net's predictors with the weights of networks, in their order.

    Raises:
        KeyError: a checkpoint has no such network.
        NotImplementedError: a network's architecture is unknown.
    """
    predictors = []
    for model, members in groupby(networks, key=lambda network: network.model):
        names = [network.name for network in members]
        weights = network_weights(read_checkpoint(model.file)) if names != [None] else {}
        for name in names:
            predictors.append(nnUNetPredictor(use_mirroring=mirroring, device=torch.device(device), allow_tqdm=False))
            with quiet():  # nnU-Net says every file in which it looks for the trainer, and cites itself
                predictors[-1].initialize_from_trained_model_folder(str(model.folder), (model.fold,), model.checkpoint)
            if name is not None:
                give_weights(predictors[-1], weights[name], f"{name} in {model.file}")
    return predictors


def give_weights(predictor: nnUNetPredictor, weights: dict[str, torch.Tensor], what: str) -> None:
    """Makes a predictor one of another network of its checkpoint; `what` is that for the message.

    Raises: NotImplementedError where the architecture is neither that of the deployed network nor the same one with
        interpolation in its decoder.
    """
    shapes = {key: tensor.shape for key, tensor in weights.items()}
    plain = unwrap(predictor.network)
    candidates = [lambda: plain, *[lambda: with_interpolation(plain)] * has_stages(plain)]
    network = next((n for n in (make() for make in candidates) if shapes == shapes_of(n)), None)
    if network is None:
        raise NotImplementedError(f"{what} has an architecture of its own. Name the others: --network student")
    if network is not plain:
        predictor.network = network  # not compiled
    predictor.list_of_parameters = [weights]


def shapes_of(network: nn.Module) -> dict[str, torch.Size]:
    """Shapes of the entries of a network's state."""
    return {key: tensor.shape for key, tensor in network.state_dict().items()}


@contextmanager
def pooled_bottleneck(predictor: nnUNetPredictor) -> Iterator[Callable[[], list[float] | None]]:
    """In the block, a function gives the mean features of the scan that was predicted last.

    They are the outputs of the encoder's last stage, averaged over space, mirrored images and all windows of the scan:
    nothing is computed twice for them. None for a network without encoder stages.
    """
    if not has_stages(predictor.network):
        yield lambda: None
        return
    predictor.network = unwrap(predictor.network)  # in a compiled one the hook would be traced
    means = []

    def note(_, __, stages: list[torch.Tensor]) -> None:
        means.append(stages[-1].float().flatten(2).mean((0, 2)))

    def take() -> list[float]:
        pooled = torch.stack(means).mean(0).tolist()
        means.clear()
        return pooled

    handle = predictor.network.encoder.register_forward_hook(note)
    try:
        yield take
    finally:
        handle.remove()
