"""Which nnU-Net is needed."""

import re
from importlib import metadata

OLDEST = (2, 8)  # the first version that reads nnUNet_extTrainer


def require_nnunet() -> None:
    """Raises ImportError in words where the installed nnunetv2 is too old; pip prevents that, `--no-deps` does not."""
    try:
        version = metadata.version("nnunetv2")
    except metadata.PackageNotFoundError:
        return  # run from its sources, or missing: importing it will tell
    if tuple(int(number) for number in re.findall(r"\d+", version)[:2]) < OLDEST:
        raise ImportError(
            f"nnunetv2 {version} is installed, but nnunet-ssl needs 2.8, the first version that finds trainers "
            f'outside of its own folder: pip install "nnunetv2>=2.8,<2.9"'
        )
