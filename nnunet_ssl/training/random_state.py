"""The states of all random generators that augmentation and methods draw from, so that a resumed training goes on."""

import os
import random
from collections.abc import Callable

import numpy as np
import torch

SEED = "nnUNet_ssl_seed"  # environment variable
LARGEST_SEED = 2**32 - 1  # that numpy takes


def seed_from_environment(rank: int = 0) -> int | None:
    """Seeds Python, numpy and torch with `nnUNet_ssl_seed` + rank, and returns the sum; None where it is not set.

    Raises: ValueError for what is not a seed.
    """
    text = os.environ.get(SEED, "")
    if not text:
        return None
    if not (text.isdecimal() and int(text) + rank <= LARGEST_SEED):
        raise ValueError(f"{SEED}={text} is not a seed: set it to an integer from 0 to {LARGEST_SEED}, or unset it.")
    seed = int(text) + rank  # every GPU draws other crops
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return seed


def get_random_state() -> dict:
    """States of torch (CPU and every CUDA device), numpy and Python, as plain tensors, numbers and strings."""
    name, keys, *rest = np.random.get_state()
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *rest],
        "python": [version, torch.tensor(internal), gauss],
    }


def set_random_state(state: dict, log: Callable[[str], object] = print) -> None:
    """Restores what `get_random_state` gave; CUDA only where the number of devices is the same, else it says so."""
    torch.set_rng_state(state["torch"].cpu())
    before, now = len(state["cuda"]), torch.cuda.device_count() if torch.cuda.is_available() else 0
    if now and before == now:
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
    elif now or before:
        log(f"The checkpoint has random states of {before} GPUs, here are {now}: what is drawn on them begins anew.")
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), *rest))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal.tolist()), gauss))
