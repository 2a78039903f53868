import pytest
import torch

from nnunet_ssl.system.device import require_device


@pytest.mark.parametrize(
    ("there", "asked", "given"),
    [((), "cuda", "cpu"), (("mps",), "cuda", "mps"), ((), "mps", "cpu"), (("cuda",), "mps", "cuda")],
)
def test_a_device_that_is_not_there_names_the_one_that_is(there, asked, given, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in there)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in there)
    with pytest.raises(ValueError, match=f"There is no {asked.upper()} device here.*-device {given}$"):
        require_device(asked)
    for name in ("cpu", *there):
        require_device(name)
