"""Tuning tables: a device's own row, else a sibling's or the default's with a warning."""

import json
import warnings
from importlib import resources

import pytest

from sevenfold.config import UnsupportedError
from sevenfold.ops.tuning import best_config, tuning

TABLES = {
    "scan": {"default": {"64": {"warps": 4}, "128": {"warps": 4}}, "H200": {"64": {"warps": 8}}}
}


@pytest.fixture(autouse=True)
def _tables(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tuning, "_tables", lambda: TABLES)
    monkeypatch.setattr(tuning, "_SIBLINGS", {"H100": "H200"})
    for cached in (best_config, tuning._say):
        cached.cache_clear()
    yield
    for cached in (best_config, tuning._say):
        cached.cache_clear()


def test_a_device_takes_its_own_row() -> None:
    assert best_config("scan", "64", "H200") == {"warps": 8}


def test_the_default_serves_other_devices_and_says_so_once() -> None:
    with pytest.warns(UserWarning, match="scan has no tuning for 128 on H200, and takes the def"):
        assert best_config("scan", "128", "H200") == {"warps": 4}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert best_config("scan", "128", "H200") == {"warps": 4}
        assert best_config("scan", "64", "default") == {"warps": 4}


def test_a_sibling_serves_a_device_and_says_so_once_for_a_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(TABLES["scan"]["H200"], "32", {"warps": 2})
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        assert best_config("scan", "64", "H100") == {"warps": 8}
        assert best_config("scan", "32", "H100") == {"warps": 2}
        assert best_config("scan", "128", "H100") == {"warps": 4}
    assert [str(one.message) for one in warned] == [
        "scan has no tuning of its own on H100, and takes that of H200",
        "scan has no tuning for 128 on H100, and takes the default",
    ]
    assert {one.filename for one in warned} == {__file__}


@pytest.mark.parametrize(("kernel", "key"), [("scan", "32"), ("other", "64")])
def test_no_row_at_all(kernel: str, key: str) -> None:
    with pytest.raises(UnsupportedError, match=f"{kernel} must have a tuning table for its key"):
        best_config(kernel, key, "H200")


def test_the_committed_tables_are_read() -> None:
    folder = resources.files("sevenfold.ops.tuning")
    for file in (entry for entry in folder.iterdir() if entry.name.endswith(".json")):
        for kernel, devices in json.loads(file.read_text()).items():
            for device, rows in devices.items():
                for key, config in rows.items():
                    assert all(isinstance(value, int) for value in config.values()), (
                        f"{file.name}: {kernel} {device} {key}"
                    )
