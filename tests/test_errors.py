"""Who is to blame: a mistake of the user is one line, a bug keeps its traceback."""

from __future__ import annotations

import pytest

from agsel.errors import MissingError, RunError, UserError, complaints_of_libraries, one_line
from agsel.runs.ranks import ends_in_one_line
from agsel.zero import RanksDisagreeError
from agsel.zero.sanity import SanityError
from agsel.zero.selection import TooManySkippedStepsError

MISTAKES = (UserError, MissingError)
FAULTS = (RunError, RanksDisagreeError, SanityError, TooManySkippedStepsError)


@pytest.mark.parametrize(("error", "code"), [(kind, 2) for kind in MISTAKES] + [(kind, 1) for kind in FAULTS])
def test_an_end_that_was_foreseen_is_one_line(
    error: type[Exception], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end, ends_in_one_line():
        raise error("first\n   second")
    assert end.value.code == code
    assert capsys.readouterr().err == "agsel: error: first second\n"


@pytest.mark.parametrize("error", [ValueError, RuntimeError, OSError, ImportError, KeyError])
def test_a_bug_inside_agsel_cannot_pass_as_a_mistake(
    error: type[Exception], capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever it is called: two lists of different lengths are a ValueError, too."""
    with pytest.raises(error), ends_in_one_line():
        raise error("a bug")
    with pytest.raises(ValueError, match="zip"), ends_in_one_line():
        list(zip([1], [], strict=True))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("error", [ValueError, OSError, ImportError, ModuleNotFoundError])
def test_libraries_refuse_what_the_user_gave_them(error: type[Exception]) -> None:
    with pytest.raises(UserError, match="no such thing") as refusal, complaints_of_libraries():
        raise error("no such  thing")
    assert isinstance(refusal.value.__cause__, error)


def test_other_errors_of_libraries_are_bugs() -> None:
    for error in (KeyError, TypeError, AttributeError, RuntimeError):
        with pytest.raises(error), complaints_of_libraries():
            raise error
    with pytest.raises(MissingError, match="as it is"), complaints_of_libraries():
        raise MissingError("as it is")


def test_a_message_becomes_one_line() -> None:
    assert one_line(ValueError(" a\n  b\tc ")) == "a b c"
