"""The engine's runner for a GPU, driven on a CPU by a graph that runs its function anew."""

from collections.abc import Callable

import torch
from engine_helpers import VOCAB_SIZE
from torch import Tensor

from sevenfold.engine.device import DeviceRunner
from sevenfold.engine.device.capture import Captured
from sevenfold.engine.memory import plan_memory
from sevenfold.engine.memory_layout import Tenant
from sevenfold.engine.storage import Storage
from sevenfold.models import HybridModel

PAGE_TOKENS = 16


class FakeCapture:
    """As a graph: it reads its inputs where they lie, and writes one output over and over.

    A replay spoils the outputs of all others, as graphs do whose outputs share their memory.
    """

    def __init__(self) -> None:
        self.recorded, self.replayed = 0, 0
        self._outputs: list[Tensor] = []

    def __call__(self, run: Callable[[], Tensor]) -> Captured:
        self.recorded += 1
        output = run().clone()
        self._outputs.append(output)

        @torch.inference_mode()
        def replay() -> None:
            self.replayed += 1
            for other in self._outputs:
                other.fill_(float("nan") if other.is_floating_point() else -1)
            output.copy_(run())

        return Captured(replay, output)


def new_storage(model: HybridModel, num_slabs: int = 26) -> Storage:
    size = {"context_tokens": 64, "page_tokens": PAGE_TOKENS}
    size["kv_element_bytes"] = model.dtype.itemsize
    slab = plan_memory(model.config, budget_bytes=1 << 30, **size).layout.slab_bytes
    plan = plan_memory(model.config, budget_bytes=num_slabs * slab, **size)
    return Storage(model.config, plan, device=model.device, dtype=model.dtype)


class Places:
    """Items of a storage by number, each in a slab of its own: slabs are shared by tenants."""

    def __init__(self, storage: Storage) -> None:
        self._places = storage.layout.places

    def state(self, n: int) -> int | None:
        """n from 1 to 6; None in a model without states."""
        return n * self._places[Tenant.STATE] or None

    def pages(self, n: int) -> list[int]:
        """Two pages, n from 0 to 4."""
        return [slab * self._places[Tenant.PAGE] for slab in (8 + 2 * n, 9 + 2 * n)]

    def snapshot(self, n: int) -> int:
        """n from 0 to 6."""
        return (19 + n) * self._places[Tenant.SNAPSHOT]


def new_runner(
    model: HybridModel,
    storage: Storage,
    capture: FakeCapture | None,
    sizes: tuple[int, ...] = (),
    prefill_sizes: tuple[int, ...] = (),
) -> DeviceRunner:
    return DeviceRunner(
        model,
        storage,
        page_tokens=PAGE_TOKENS,
        batch_sizes=sizes,
        prefill_sizes=prefill_sizes,
        capture=capture,
    )


def prompt(num_tokens: int, seed: int) -> list[int]:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB_SIZE, (num_tokens,), generator=random).tolist()
