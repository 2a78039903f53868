"""Every test run gets its own nnU-Net folders."""

import os
import tempfile
from pathlib import Path

from nnunet_ssl.autoregister import register

# Set while pytest loads this file, before any test imports nnunetv2.
_ROOT = tempfile.TemporaryDirectory(prefix="nnunet_ssl_tests_")
for _name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
    _folder = Path(_ROOT.name, _name)
    _folder.mkdir()
    os.environ[_name] = str(_folder)
os.environ["nnUNet_n_proc_DA"] = "0"  # no worker processes
os.environ["nnUNet_compile"] = "0"
register()


def pytest_unconfigure():
    _ROOT.cleanup()
