"""Which devices there are."""


def require_device(name: str) -> None:
    """Raises ValueError, which names the -device to give, where "cuda" or "mps" is not there."""
    import torch  # takes seconds

    mps = torch.backends.mps.is_available()
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"There is no CUDA device here. Give the one that is there: -device {'mps' if mps else 'cpu'}")
    if name == "mps" and not mps:
        other = "cuda" if torch.cuda.is_available() else "cpu"
        raise ValueError(f"There is no MPS device here. Give the one that is there: -device {other}")
