"""What a training step holds, op by op, without a GPU: fake tensors, on which operators choose as
on one.

A ledger counts the bytes of every tensor's storage from its operator to its end. It does not see
what an operator takes and gives back inside, but for what FlashAttention's backward sums in fp32.
"""

import importlib
import pkgutil
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from sevenfold import ops
from sevenfold.models import Batch, HybridModel, ModelConfig
from sevenfold.ops.types import Impl
from sevenfold.optim import OptimizerConfig, build_optimizer
from sevenfold.parallel import Layout, ParallelConfig, divide_model, divide_row, groups_by_mesh
from sevenfold.parallel.building import divided_on_meta
from sevenfold.parallel.gradients import local
from sevenfold.train.transform import narrow_stream, recompute_blocks
from sevenfold.train.whole_matrices import gathered

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Rules of sevenfold.ops, as a GPU in bf16 answers them; log_decay's check would read a fake number.
_ANSWERS = {
    "runs_on_gpu": lambda x: x.dtype in _DTYPES,
    "check_on_gpu": lambda *_: None,
    "check_supported": lambda *_: None,
    "default_impl": lambda *_: Impl.TRITON,
    "default_block_impl": lambda *_: Impl.FLASH,
    "default_linear_impl": lambda *_: Impl.EAGER,
    "suits_keeping": lambda *_: True,
    "suits_numba": lambda *_: False,
}


class Ledger(TorchDispatchMode):
    """Bytes that live now, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # it comes again with what the rank holds
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self.add(x)
        inside = 0
        if "_flash_attention_backward" in str(func):
            inside = args[1].numel() * 4
        self.peak = max(self.peak, self.now + inside)
        return out

    def add(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        if storage not in self._known:
            self._known[storage] = True
            self.now += storage.nbytes()
            weakref.finalize(storage, self._end, storage.nbytes())

    def _end(self, size: int) -> None:
        self.now -= size


def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let operators choose for fake tensors on a CPU what they choose on a GPU."""
    for found in pkgutil.walk_packages(ops.__path__, "sevenfold.ops."):
        if "triton" not in found.name or found.name.endswith("triton_op"):
            importlib.import_module(found.name)
    for name, module in list(sys.modules.items()):
        if name.startswith("sevenfold"):
            for rule, answer in _ANSWERS.items():
                if rule in vars(module):
                    monkeypatch.setattr(module, rule, answer)
    api = sys.modules["sevenfold.ops.lightning.api"]
    monkeypatch.setattr(api, "check", lambda *_: None)
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)


def peak_of_step(
    config: ModelConfig, rows: int, tokens: int, *, recompute_every: int | None, ranks: int = 1
) -> int:
    """The most bytes of a forward and a backward, whole fp32 weights included, two moments not."""
    way = "ring" if config.count("full_attention") and ranks > 1 else None
    with _layout(ParallelConfig(context=ranks, context_attention=way)) as layout:
        model = _model(config, layout)
        batch = Batch.rows(rows, tokens, device=torch.device("cpu"))
        if ranks > 1:
            batch = divide_row((rows * tokens * ranks,), ranks, 0, device=torch.device("cpu"))
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        ledger = Ledger()
        with fake:
            _make_fake(model)
        narrow_stream(model)
        if recompute_every is not None:
            recompute_blocks(model, recompute_every)
        with fake, ledger:
            for parameter in model.parameters():
                ledger.add(parameter)
            ids, labels, positions = (torch.empty(batch.positions.shape).long() for _ in range(3))
            ledger.peak = ledger.now
            with torch.autocast("cpu", dtype=torch.bfloat16):
                out = model.hidden(ids, replace(batch, positions=positions)).hidden
                loss = model.cross_entropy(out, labels)
            del out
            (loss / 2).backward()
        return ledger.peak


def peak_of_update(
    config: ModelConfig, parallel: ParallelConfig, optimizer: OptimizerConfig, *, device: str
) -> tuple[int, int]:
    """Elements of a rank's moments, and the most bytes of an update besides what lived before.

    Matrices are in bf16 on "cuda", whose tensors are fake ones; and on "cpu", where all is.
    """
    dtype = torch.float32 if device == "cuda" else torch.bfloat16
    with _layout(parallel) as layout:
        model = divided_on_meta(config, layout, between=lambda _: None, dtype=dtype)
        with FakeTensorMode(allow_non_fake_inputs=True):
            model.to_empty(device=device)
            if config.tie_word_embeddings:
                model.lm_head.weight = model.embed_tokens.weight
            parts = gathered(model, layout)
            named = model.named_parameters()
            built = build_optimizer(named, optimizer, by_mesh=groups_by_mesh, parts=parts)
            ledger, moments = Ledger(), 0
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
                state = [local(x) for name, x in built.state[parameter].items() if name != "step"]
                moments += sum(x.numel() for x in state)
                for x in (local(parameter), local(parameter.grad), *state):
                    ledger.add(x)
            before = ledger.peak = ledger.now
            built.step()  # DTensor asks what shapes come out once, of tensors that are none
            with ledger:
                built.step()
        return moments, ledger.peak - before


@contextmanager
def _layout(parallel: ParallelConfig) -> Iterator[Layout]:
    if parallel.num_ranks == 1:
        yield Layout(parallel)
        return
    dist.init_process_group("fake", rank=0, world_size=parallel.num_ranks, store=FakeStore())
    try:
        yield Layout.join(parallel, "cpu")
    finally:
        dist.destroy_process_group()


def _model(config: ModelConfig, layout: Layout) -> HybridModel:
    with torch.device("meta"):
        model = HybridModel(config)
    divide_model(model.train(), layout)
    return model


def _make_fake(model: HybridModel) -> None:
    made: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            empty = torch.nn.Parameter(torch.empty(parameter.shape))
            setattr(module, name, made.setdefault(id(parameter), empty))
