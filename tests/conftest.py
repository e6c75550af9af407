"""The order of the tests, and what the garbage collector passes over."""

import gc

import pytest

# First, so that no worker ends alone with one, and others meanwhile compile the loops that all use.
LONGEST = ("test_kernels_interpreted.py", "test_train_kill.py")

# What is imported while tests are collected stays: a million objects, 0.5 s of each collection.
gc.disable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONGEST)


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()
