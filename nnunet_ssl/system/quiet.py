"""Keeping what other packages say out of our commands' output."""

import contextlib
import io
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[io.StringIO]:
    """Collects what is printed in the block, as nnU-Net's citation and its search for trainers; errors are raised."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        yield said


@contextlib.contextmanager
def without_warnings_of_others() -> Iterator[None]:
    """Hides warnings for developers; those about numbers (RuntimeWarning) stay, and so does everything logged."""
    with warnings.catch_warnings():
        for category in (FutureWarning, DeprecationWarning, PendingDeprecationWarning, UserWarning, SyntaxWarning):
            warnings.simplefilter("ignore", category)
        yield
