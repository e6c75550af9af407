"""A short row's kernel compiles for a GPU: the interpreter lets pass what the compiler does not."""

from pathlib import Path

import pytest

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sevenfold.ops.lightning import triton_short

POINTERS = dict.fromkeys(("q", "k", "v", "o"), "*bf16")
POINTERS |= dict.fromkeys(("log_decay", "state_in", "states", "pool"), "*fp32")
POINTERS |= {"table": "*i32", "stops": "*i32", "slots": "*i64", "scale": "fp32"}


@pytest.mark.parametrize("BT", [16, 128])
def test_it_compiles_for_hopper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, BT: int) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = triton_short.short_kernel.kernel
    sizes = {"K": 128, "V": 128, "BK": 128, "BV": triton_short._VALUES, "BT": BT}
    sizes["BM"] = min(BT, triton_short._ROWS)
    constants = sizes | {"HAS_IN": True, "OVERLAPS": True}
    types = POINTERS | dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    source = ASTSource(kernel, signature, constexprs=constants)
    compiled = triton.compile(source, GPUTarget("cuda", 90, 32), {"num_warps": 4})
    assert "griddepcontrol.wait" in compiled.asm["ptx"]
    assert "wgmma" not in compiled.asm["ptx"]  # wrong there: see triton_short
