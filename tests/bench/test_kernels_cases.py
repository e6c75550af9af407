"""The kernel benchmark's cases: those of the plan, with floors that can be worked out by hand."""

import pytest

from sevenfold.bench.kernels.cases import (
    SWEEP_TOKENS,
    Case,
    Task,
    all_cases,
    cases_of,
    group_names,
)
from sevenfold.bench.kernels.floors import floor_bytes, floor_s
from sevenfold.bench.kernels.inputs import num_turns
from sevenfold.config import ConfigError

BY_NAME = {case.name: case for case in all_cases()}


def test_names_are_told_apart() -> None:
    assert len(BY_NAME) == len(all_cases())


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("forward B1 T32768 H64", 0.56e-3),
        ("forward B8 T4096 H64", 0.58e-3),
        ("forward B64 T512 H64", 0.60e-3),
        ("forward B1 T131072 H8", 0.33e-3),
        ("forward B1 T1048576 H4", 1.20e-3),
        ("forward + backward B1 T32768 H64", 2.2e-3),
        ("extra memory B1 T65536 H64", 1e8),
        ("decode B1 H64", 6e-6),
        ("decode B128 H64", 0.19e-3),
        ("decode B16 H64", None),
        ("verify 4 tokens B64 H64", 0.17e-3),
    ],
)
def test_targets(name: str, target: float | None) -> None:
    assert BY_NAME[name].target == target


@pytest.mark.parametrize(
    ("name", "num_bytes"),
    [
        # 4 tensors of 32,768 x 64 x 128 elements of 2 bytes.
        ("forward B1 T32768 H64", 2_147_483_648),
        ("forward B64 T512 H64", 2_147_483_648),
        ("forward B1 T131072 H8", 1_073_741_824),
        ("forward B1 T1048576 H4", 4_294_967_296),
        ("forward + backward B1 T32768 H64", 5_905_580_032),
        # 64 KiB a head and sequence, read and written.
        ("decode B1 H64", 8_388_608),
        ("decode B128 H64", 1_073_741_824),
        ("verify 4 tokens B64 H64", 536_870_912),
        ("extra memory B1 T65536 H64", 0),
    ],
)
def test_floors_in_bytes(name: str, num_bytes: int) -> None:
    assert floor_bytes(BY_NAME[name]) == num_bytes


def test_floors_in_time() -> None:
    assert floor_s(BY_NAME["forward B1 T32768 H64"], 2.0**32) == 0.5
    assert floor_s(BY_NAME["decode B128 H64"], 2.0**32) == 0.25
    assert floor_s(BY_NAME["extra memory B1 T65536 H64"], 2.0**32) is None


def test_the_sweep_holds_a_million_tokens_and_only_more_above() -> None:
    sweep = [case for case in all_cases() if "sweep" in case.groups]
    assert sorted(case.T for case in sweep) == [2**n for n in range(7, 23)]
    assert all(max(SWEEP_TOKENS, case.T) == case.B * case.T for case in sweep)
    assert {case.H for case in sweep} == {4}


def test_packed_documents_fill_the_row() -> None:
    packed = [case for case in all_cases() if case.lengths is not None]
    assert [sum(case.lengths or ()) for case in packed] == [case.T for case in packed]
    uniform, skewed = (set(case.lengths or ()) for case in packed)
    assert (len(uniform), min(skewed), max(skewed)) == (1, 1, 16_384)


def test_layers_are_the_first_and_the_last_two() -> None:
    assert {case.layer for case in all_cases() if "layers" in case.groups} == {0, 78, 79}


def test_groups_are_picked_by_name() -> None:
    assert cases_of([]) == all_cases()
    picked = cases_of(["decode", "sweep"])
    assert {name for case in picked for name in case.groups} == {"decode", "sweep", "forward"}
    assert [case.name for case in picked if "forward" in case.groups] == ["forward B1 T1048576 H4"]
    with pytest.raises(ConfigError, match=r"cases must be of forward, .*, got speed"):
        cases_of(["speed"])
    assert len(group_names()) == len(set(group_names())) == 9


@pytest.mark.parametrize(("B", "turns"), [(1, 64), (16, 4), (64, 2), (256, 2)])
def test_decoding_goes_round_more_states_than_a_cache_holds(B: int, turns: int) -> None:
    """One sequence of 64 heads has 4 MiB; 256 MiB are gone round, or as much as two calls take."""
    assert num_turns(Case("", ("decode",), Task.DECODE, B, 1, 64)) == turns
