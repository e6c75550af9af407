"""The family of errors: each also the type of the standard library, and each crosses processes."""

import pickle

import pytest

from sevenfold import config
from sevenfold.config import (
    CheckpointError,
    ConfigError,
    DataError,
    SevenfoldError,
    TrainingError,
    UnsupportedError,
)

FAMILY = {
    ConfigError: ValueError,
    CheckpointError: ValueError,
    DataError: ValueError,
    TrainingError: RuntimeError,
    UnsupportedError: NotImplementedError,
}


@pytest.mark.parametrize(("error", "standard"), FAMILY.items())
def test_each_is_also_the_standard_type(error: type[Exception], standard: type) -> None:
    for caught in (SevenfoldError, standard, error):
        with pytest.raises(caught, match=r"^lr must be > 0, got 0$"):
            raise error("lr must be > 0, got 0")


@pytest.mark.parametrize("error", FAMILY)
def test_each_is_picklable(error: type[Exception]) -> None:
    copy = pickle.loads(pickle.dumps(error("path", 3)))
    assert (type(copy), copy.args) == (error, ("path", 3))


def test_the_family_is_whole() -> None:
    errors = {x for x in vars(config).values() if isinstance(x, type) and issubclass(x, Exception)}
    assert errors == {SevenfoldError, *FAMILY}
