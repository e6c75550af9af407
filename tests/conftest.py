"""The garbage collector passes over what the tests' imports leave: a million objects that stay."""

import gc

gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()
