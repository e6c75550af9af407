"""The kernel compiles for a GPU: the interpreter lets pass what the compiler does not."""

from pathlib import Path

import pytest

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sevenfold.ops.items import triton_items


def test_it_compiles_for_hopper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = triton_items._copy_and_clear_kernel
    types = dict.fromkeys(("words", "copied", "places"), "*i64") | {"BLOCK": "constexpr"}
    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    source = ASTSource(kernel, signature, constexprs={"BLOCK": triton_items._BLOCK})
    compiled = triton.compile(source, GPUTarget("cuda", 90, 32), {"num_warps": triton_items._WARPS})
    assert "st.global" in compiled.asm["ptx"]
