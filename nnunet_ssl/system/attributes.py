"""An attribute of an object that is another one for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """In the block, the attribute `name` of `owner` has another value; afterwards its own one again.

    Not for the parameters and parts of a torch module, which are no attributes of the object itself.
    """
    inherited, own = name not in vars(owner), getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name) if inherited else setattr(owner, name, own)
