"""SwiGLU's elementwise part."""

from sevenfold.ops.swiglu.api import default_swiglu_impl, swiglu

__all__ = ["default_swiglu_impl", "swiglu"]
