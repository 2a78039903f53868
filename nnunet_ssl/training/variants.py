"""Trainers that differ from another one in settings only."""

STOCK_SETTINGS = (  # nnU-Net sets these in its trainer's __init__
    "num_epochs",
    "initial_lr",
    "weight_decay",
    "oversample_foreground_percent",
    "probabilistic_oversampling",
    "num_iterations_per_epoch",
    "num_val_iterations_per_epoch",
    "enable_deep_supervision",
    "save_every",
)


def stock_settings(trainer: type) -> dict:
    """Those of nnU-Net's settings that a trainer has as class attributes, which shall win."""
    return {name: getattr(trainer, name) for name in STOCK_SETTINGS if hasattr(trainer, name)}


def epoch_variants(module: dict):
    """Module-level `__getattr__` that makes `<trainer>_<N>epochs` of the module's trainers when nnU-Net asks for them.

    Args:
        module: `globals()` of a trainer file.
    """

    def find(name: str) -> type:
        base, _, ending = name.rpartition("_")
        number = ending.removesuffix("epochs")
        trainer = module.get(base)
        if not (isinstance(trainer, type) and ending.endswith("epochs") and number.isdecimal() and int(number) > 0):
            raise AttributeError(f"module {module['__name__']!r} has no attribute {name!r}")
        attributes = {"num_epochs": int(number), "__module__": trainer.__module__, "__doc__": trainer.__doc__}
        return type(name, (trainer,), attributes)

    return find
