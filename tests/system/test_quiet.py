import sys
import warnings

import pytest

from nnunet_ssl.system.quiet import quiet, without_warnings_of_others


def test_what_others_print_is_collected_and_errors_stay(capsys):
    def talk():
        with quiet() as said:
            print("Please cite")
            print("error", file=sys.stderr)
            raise ValueError(said.getvalue())

    with pytest.raises(ValueError, match="Please cite"):
        talk()
    assert capsys.readouterr() == ("", "error\n")


def test_warnings_for_developers_are_hidden_and_those_about_numbers_are_not():
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with without_warnings_of_others():
            for category in (FutureWarning, UserWarning, DeprecationWarning, RuntimeWarning):
                warnings.warn(category.__name__, category, stacklevel=1)
        warnings.warn("afterwards", FutureWarning, stacklevel=1)
    assert [str(warning.message) for warning in seen] == ["RuntimeWarning", "afterwards"]
