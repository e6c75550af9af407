"""Operators that torch knows, called past its dispatcher where nothing there would act.

torch.library's own way takes a call through six Python frames and an autograd function made for it.
On an AMD EPYC host one call with a gradient costs 38 us more than its work that way, 8 us more as a
plain autograd function.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# What else an operator may be given for it to be called directly.
_PLAIN = frozenset({int, float, bool, str, type(None), torch.dtype})


class Operator:
    """A function that torch.library knows under a name, with its gradient.

    A call goes through torch.library wherever somebody follows operators: a compiler, a tracer, a
    mode, a transform, a subclass of Tensor. Elsewhere it runs the function itself.

    definition: what torch.library made of it.
    """

    def __init__(self, name: str, run: Callable[..., Any]) -> None:
        self.definition = torch.library.custom_op(name, run, mutates_args=())
        self.__name__, self.__doc__ = run.__name__, run.__doc__
        self._run = run
        self._with_gradient: Callable[..., Any] | None = None

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        """Say what the results look like; as torch.library."""
        return self.definition.register_fake(fake)

    def register_autograd(
        self, backward: Callable[..., Any], *, setup_context: Callable[..., None]
    ) -> None:
        """Give the operator a gradient; arguments as torch.library's."""
        self.definition.register_autograd(backward, setup_context=setup_context)
        self._with_gradient = _function(self._run, backward, setup_context).apply

    def __call__(self, *args: Any) -> Any:
        """Run the operator on positional arguments."""
        if torch.compiler.is_compiling() or _is_followed():
            return self.definition(*args)
        needs_gradient = False
        for x in args:
            kind = type(x)
            if kind is Tensor or kind is nn.Parameter:
                if x.is_meta or x.is_neg():  # whose numbers are not those at its address
                    return self.definition(*args)
                needs_gradient = needs_gradient or x.requires_grad
            elif kind not in _PLAIN:
                return self.definition(*args)
        if not needs_gradient or not torch.is_grad_enabled():
            return self._run(*args)
        if self._with_gradient is None:  # whose results then refuse a backward
            return self.definition(*args)
        return self._with_gradient(*args)


def operator(name: str) -> Callable[[Callable[..., Any]], Operator]:
    """Register the decorated function with torch.library, under a name with its namespace.

    The function must change none of its arguments, and return none of them.
    """
    return lambda run: Operator(name, run)


def _is_followed() -> bool:
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state()
    )


def _function(
    run: Callable[..., Any], backward: Callable[..., Any], setup_context: Callable[..., None]
) -> type[torch.autograd.Function]:
    def forward(ctx: Any, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():  # as in torch.library: no result is a view
            output = run(*args)
        setup_context(ctx, args, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(run.__name__, (torch.autograd.Function,), methods)
