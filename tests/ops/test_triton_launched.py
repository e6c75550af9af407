"""Which launches of a kernel take what was compiled before."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import CompiledKernel

from sevenfold.ops import triton_launched
from sevenfold.ops.triton_launched import BulkCopies, Launched, launch_key

if not triton_launched._IS_KNOWN_TRITON:
    pytest.skip("launches by Triton alone", allow_module_level=True)

from triton._C.libtriton import native_specialize_impl

MEMORY = torch.zeros(64, dtype=torch.float32)
TENSORS = [
    MEMORY,
    MEMORY[4:],
    MEMORY[1:],
    MEMORY.to(torch.bfloat16),
    MEMORY.to(torch.bfloat16)[3:],
    MEMORY.to(torch.float16),
    MEMORY.to(torch.int32),
    torch.nn.Parameter(MEMORY),
    MEMORY[:0],
]
NUMBERS = [0, 1, 2, 15, 16, 17, -1, -16, 2**31 - 16, 2**31 - 1, 2**31, -(2**31), -(2**31) - 1]
NUMBERS += [2**32, 2**63 - 1, 2**63, 2**64 - 16, 2**64 - 1]
VALUES = [*TENSORS, *NUMBERS, 0.5, 1.0, True, False, None]


def specialised(x: Any) -> Any:
    """What Triton compiles a kernel for."""
    return native_specialize_impl(CUDABackend, x, False, True, True)


def test_a_key_is_at_least_as_fine_as_tritons() -> None:
    keys = [launch_key((x,))[0] for x in VALUES]
    kinds = [specialised(x) for x in VALUES]
    assert len(set(kinds)) > 12
    for key, kind in zip(keys, kinds, strict=True):
        assert {k for a, k in zip(keys, kinds, strict=True) if a == key} == {kind}


def test_a_key_tells_where_one_argument_ends() -> None:
    pairs = {
        launch_key((a, b))[0]: (specialised(a), specialised(b)) for a in VALUES for b in VALUES
    }
    for a in VALUES:
        for b in VALUES:
            assert pairs[launch_key((a, b))[0]] == (specialised(a), specialised(b))


def test_equal_kinds_share_a_key() -> None:
    x = torch.zeros(3, 5, dtype=torch.bfloat16)
    assert launch_key((x, 32, 3, 0.5))[0] == launch_key((x.clone().t(), 48, 5, 0.25))[0]


def test_tensors_are_passed_by_their_address() -> None:
    values = launch_key((MEMORY[1:], 7, None))[1]
    assert values == [MEMORY.data_ptr() + 4, 7, None]


def test_bulk_copies_differ_by_block_and_dtype() -> None:
    def key(x: Tensor, part: int) -> Any:
        return launch_key((BulkCopies(x, (4, 2, 8), (16, 8, 1), (64, 1, part)),))[0]

    half, other = MEMORY.to(torch.float16), MEMORY.to(torch.bfloat16)
    assert key(half, 64) == key(half.clone(), 64)
    assert len({key(half, 64), key(half, 128), key(other, 64)}) == 3


def test_what_is_unknown_has_no_key() -> None:
    assert launch_key((MEMORY, object()))[0] is None


class Kernel:
    """A kernel as Triton's, which writes down who launched it."""

    def __init__(self) -> None:
        constants = {"x": False, "n": False, "WIDE": True, "FLAG": True}
        self.params = [
            SimpleNamespace(name=name, is_constexpr=is_constant, default=3)
            for name, is_constant in constants.items()
        ]
        self.by_triton: list[tuple] = []
        self.direct: list[tuple] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **constants: Any) -> Any:
            self.by_triton.append((grid, args, constants))
            number = len(self.by_triton)

            def run(*given: Any) -> None:
                self.direct.append((number, given))

            compiled = object.__new__(CompiledKernel)
            compiled._run, compiled.module = run, object()
            compiled.function, compiled.packed_metadata = number, "metadata"
            return compiled

        return launch


class Driver:
    device = 0

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 70 + device


@pytest.fixture
def active(monkeypatch: pytest.MonkeyPatch) -> Driver:
    active = Driver()
    monkeypatch.setattr(triton_launched, "driver", SimpleNamespace(active=active))
    return active


def test_the_second_launch_of_a_kind_is_direct(active: Driver) -> None:
    kernel = Kernel()
    launches: Any = Launched(kernel)  # pyright: ignore[reportArgumentType]
    launches[(5,)](MEMORY, 32, FLAG=True, num_warps=4)
    launches[(6, 2)](MEMORY[4:], 48, FLAG=True, num_warps=4)
    assert [(grid, args) for grid, args, _ in kernel.by_triton] == [((5,), (MEMORY, 32))]
    place = (6, 2, 1, 70, 1, "metadata", None, None, None)
    assert kernel.direct == [(1, (*place, MEMORY.data_ptr() + 16, 48, 3, True))]


@pytest.mark.parametrize(
    ("x", "n", "constants"),
    [
        (MEMORY[1:], 32, {"FLAG": 1}),
        (MEMORY.to(torch.int32), 32, {"FLAG": 1}),
        (MEMORY, 33, {"FLAG": 1}),
        (MEMORY, 1, {"FLAG": 1}),
        (MEMORY, 2**40, {"FLAG": 1}),
        (MEMORY, 32, {"FLAG": 2}),
        (MEMORY, 32, {"FLAG": True}),
        (MEMORY, 32, {"FLAG": 1.0}),
        (MEMORY, 32, {"FLAG": 1, "WIDE": 3}),
        (MEMORY, 32, {"WIDE": 1}),
        (MEMORY, 32, {"FLAG": 1, "num_warps": 8}),
    ],
)
def test_another_kind_goes_through_triton(
    active: Driver, x: Tensor, n: int, constants: dict[str, Any]
) -> None:
    kernel = Kernel()
    launches: Any = Launched(kernel)  # pyright: ignore[reportArgumentType]
    launches[(1,)](MEMORY, 32, FLAG=1)
    launches[(1,)](x, n, **constants)
    assert len(kernel.by_triton) == 2
    launches[(1,)](x, n, **constants)
    launches[(1,)](MEMORY, 32, FLAG=1)
    assert [number for number, _ in kernel.direct] == [2, 1]


def test_each_device_has_its_own(active: Driver) -> None:
    kernel = Kernel()
    launches: Any = Launched(kernel)  # pyright: ignore[reportArgumentType]
    launches[(1,)](MEMORY, 32)
    active.device = 1
    launches[(1,)](MEMORY, 32)
    launches[(1,)](MEMORY, 32)
    assert len(kernel.by_triton) == 2
    assert [(number, given[3]) for number, given in kernel.direct] == [(2, 71)]


def test_a_constant_by_position_stays_with_triton(active: Driver) -> None:
    kernel = Kernel()
    launches: Any = Launched(kernel)  # pyright: ignore[reportArgumentType]
    for _ in range(2):
        launches[(1,)](MEMORY, 32, 5)
    assert len(kernel.by_triton) == 2


def test_an_argument_by_name_stays_with_triton(active: Driver) -> None:
    kernel = Kernel()
    launches: Any = Launched(kernel)  # pyright: ignore[reportArgumentType]
    for _ in range(2):
        launches[(1,)](MEMORY, n=32)
    assert len(kernel.by_triton) == 2


def test_hooks_of_launches_are_called(active: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel()
    launches: Any = Launched(kernel)  # pyright: ignore[reportArgumentType]
    launches[(1,)](MEMORY, 32)
    monkeypatch.setattr(triton.knobs.runtime.launch_enter_hook, "calls", [print])
    launches[(1,)](MEMORY, 32)
    assert len(kernel.by_triton) == 2
    assert not kernel.direct


def test_kernels_that_are_compiled_together_are_not_launched(
    active: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Kernel()
    launches: Any = Launched(kernel)  # pyright: ignore[reportArgumentType]
    launches[(1,)](MEMORY, 32)
    mode = SimpleNamespace(get=object)
    monkeypatch.setattr(triton_launched, "active_mode", mode)
    launches[(1,)](MEMORY, 32)  # known, and left to Triton all the same
    launches[(1,)](MEMORY, 33)  # compiled, and not yet known
    mode.get = lambda: None
    launches[(1,)](MEMORY, 33)
    assert len(kernel.by_triton) == 4
    launches[(1,)](MEMORY, 33)
    assert [number for number, _ in kernel.direct] == [4]
