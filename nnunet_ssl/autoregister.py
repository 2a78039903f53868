"""Tells nnU-Net where the installed trainers are; runs at every Python start, so it imports nothing but os."""

import os


def trainers_folder() -> str:
    """The folder that holds the trainer files: inside the installed package, beside it in a checkout."""
    package = os.path.dirname(os.path.abspath(__file__))
    installed = os.path.join(package, "trainers")
    return installed if os.path.isdir(installed) else os.path.join(os.path.dirname(package), "trainers")


def register() -> None:
    """Append `trainers_folder()` to nnUNet_extTrainer, the list of folders that nnU-Net searches for trainers.

    What the variable holds already stays and is searched first; a second call changes nothing.
    NNUNET_SSL_NO_AUTOREGISTER=1 turns registration off.
    """
    if os.environ.get("NNUNET_SSL_NO_AUTOREGISTER", "0") not in ("", "0"):
        return
    folders = os.environ.get("nnUNet_extTrainer", "")
    if trainers_folder() not in folders.split(os.pathsep):
        os.environ["nnUNet_extTrainer"] = folders + os.pathsep + trainers_folder() if folders else trainers_folder()
