"""No network, no shell, no code in what we store."""

import ast
import io
import socket
from pathlib import Path

import pytest
import torch
from tiny_trainers import every_trainer, make_trainer, seed

from nnunet_ssl.training.checkpoints import CHECKPOINT_KEY

ROOT = Path(__file__).parents[2]
FILES = sorted(
    file for folder in ("nnunet_ssl", "trainers", "dataset_conversion") for file in (ROOT / folder).rglob("*.py")
)
assert ROOT / "nnunet_ssl" / "commands" / "compare" / "job.py" in FILES
NETWORK = {"socket", "ssl", "http", "urllib", "ftplib", "smtplib", "requests", "httpx", "aiohttp", "xmlrpc"}
SHELL = {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "eval", "exec"}


def offences(source: str) -> list[str]:
    """Imports of network modules, calls of a shell or of code in strings."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.partition(".")[0] in NETWORK]
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in NETWORK:
            found.append(node.module)
        if isinstance(node, ast.Call):
            if ast.unparse(node.func) in SHELL:
                found.append(ast.unparse(node.func))
            found += ["shell" for k in node.keywords if k.arg == "shell" and ast.unparse(k.value) != "False"]
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_file_uses_the_network_or_a_shell(file):
    assert offences(file.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    ["import urllib.request", "from http import client", "os.system(x)", "subprocess.run(x, shell=True)", "eval(x)"],
)
def test_an_offence_would_be_found(source):
    assert len(offences(source)) == 1


@pytest.mark.parametrize("trainer_class", every_trainer())
def test_a_training_opens_no_connection_and_stores_no_code(trainer_class, tiny_dataset, tmp_path, monkeypatch):
    def refuse(self, address):
        raise AssertionError(f"connection to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    seed()
    trainer = make_trainer(trainer_class, tiny_dataset, num_epochs=1)
    trainer.run_training()
    checkpoint = torch.load(f"{trainer.output_folder}/checkpoint_final.pth", weights_only=False)
    ours = io.BytesIO()
    torch.save(checkpoint[CHECKPOINT_KEY], ours)
    ours.seek(0)
    assert torch.load(ours, weights_only=True).keys() == checkpoint[CHECKPOINT_KEY].keys()
