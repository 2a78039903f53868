"""`nnUNetTrainer_<N>epochs` for every N: the supervised baseline of a semi-supervised training with as many epochs.

nnU-Net has classes for some numbers only; those are found before these.
"""

import re

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


def __getattr__(name: str) -> type:
    match = re.fullmatch(r"nnUNetTrainer_([1-9]\d*)epochs", name)
    if match is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    class Variant(nnUNetTrainer):
        # nnU-Net keeps the arguments by the names of this signature
        def __init__(self, plans, configuration, fold, dataset_json, device=torch.device("cuda")):  # noqa: B008
            super().__init__(plans, configuration, fold, dataset_json, device)
            self.num_epochs = int(match[1])

    Variant.__name__ = Variant.__qualname__ = name
    return Variant
