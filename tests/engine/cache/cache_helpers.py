"""Small plans, and a runner that writes what a model would: tuples of tokens instead of numbers."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from sevenfold.engine.cache import CacheManager
from sevenfold.engine.memory import MemoryPlan, plan_memory
from sevenfold.engine.memory_layout import SINK, ArenaLayout, Tenant
from sevenfold.engine.precision import SnapshotDtype
from sevenfold.engine.request import Request
from sevenfold.models import LayerType, ModelConfig

P = 16
LINEAR, FULL = "linear_attention", "full_attention"
HYBRID: tuple[LayerType, ...] = (LINEAR, LINEAR, FULL)

# What an item holds: the salt and the tokens that its contents were computed from.
Content = tuple[bytes, tuple[int, ...]]


def tiny_config(layer_types: tuple[LayerType, ...] = HYBRID, head_dim: int = 16) -> ModelConfig:
    return ModelConfig(
        vocab_size=64,
        hidden_size=64,
        layer_types=layer_types,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=head_dim,
        intermediate_size=64,
        rotary_dim=8,
    )


def tiny_plan(
    num_slabs: int,
    layer_types: tuple[LayerType, ...] = HYBRID,
    snapshot_dtype: SnapshotDtype = "fp32",
    head_dim: int = 16,
    host_slabs: int = 0,
) -> MemoryPlan:
    """A plan of that many slabs; of a hybrid, a slab holds 1 state, 8 pages of 16 tokens."""

    def plan(budget: int, host: int = 0) -> MemoryPlan:
        return plan_memory(
            tiny_config(layer_types, head_dim),
            budget_bytes=budget,
            context_tokens=1,
            page_tokens=P,
            snapshot_dtype=snapshot_dtype,
            host_bytes=host,
        )

    slab = plan(1 << 30).layout.slab_bytes
    return plan(num_slabs * slab, host_slabs * slab)


def blocks(text: str) -> tuple[int, ...]:
    """One token a letter, repeated to a block."""
    return tuple(token for letter in text for token in [ord(letter)] * P)


@dataclass
class Runner:
    """Runs requests through a manager as an engine would, and checks what they read.

    memory: what each item of each tenant holds. host: what its copies hold.
    """

    manager: CacheManager
    memory: dict[tuple[Tenant, int], Content | None] = field(default_factory=dict)
    host: dict[tuple[Tenant, int], Content | None] = field(default_factory=dict)
    open: dict[str, Request] = field(default_factory=dict)
    num_made: int = 0

    def request(
        self,
        prompt: tuple[int, ...],
        *,
        max_tokens: int = 1000,
        marks: tuple[int, ...] = (),
        salt: bytes = b"",
        session: str | None = None,
    ) -> Request:
        self.num_made += 1
        name = f"r{self.num_made}"
        return Request(name, prompt, max_tokens, marks=marks, salt=salt, session=session)

    def start(self, request: Request) -> int | None:
        """Open a request, and check the prefix that it is to go on from."""
        hit = self.manager.open(request)
        if hit is None:
            return None
        request.num_computed_tokens = hit
        self.zero()
        self.adopt(request)
        return hit

    def adopt(self, request: Request) -> None:
        """Begin to run a request that was opened, from the state that it is to go on from."""
        self.open[request.id] = request
        hit = request.num_computed_tokens
        self._check_pages(request)
        place = self.manager.placement(request)
        if place.state is None:
            return
        assert (place.restore is not None) == (hit > 0)
        if place.restore is None:
            assert self.memory[Tenant.STATE, place.state] is None
        else:
            snapshot = self.memory[Tenant.SNAPSHOT, place.restore]
            assert snapshot == (request.salt, request.tokens[:hit])
            self.memory[Tenant.STATE, place.state] = snapshot

    def compute(self, request: Request, end: int) -> bool:
        """Run the tokens up to end; False when there are no pages for them."""
        first = request.num_computed_tokens
        if not self.manager.extend(request, end):
            return False
        due = self.manager.snapshots_due(request, first, end)
        self.zero()
        self.run(request, end, due)
        request.num_computed_tokens = end
        return True

    def run(self, request: Request, end: int, due: Sequence[int]) -> None:
        """Write what the model would on its way to end."""
        first = request.num_computed_tokens
        assert list(due) == sorted(due)
        assert all(first < at <= end and at % P == 0 for at in due)
        place = self.manager.placement(request)
        assert set(due) <= set(place.snapshots)
        pages = self.manager.pages(request)
        if self.manager.plan.has_pages:
            for block in range(first // P, -(-end // P)):
                self._write(Tenant.PAGE, pages[block], request, min(end, (block + 1) * P))
        if place.state is not None:
            held = self.memory[Tenant.STATE, place.state]
            assert held == ((request.salt, request.tokens[:first]) if first else None)
            self._write(Tenant.STATE, place.state, request, end)
        for at in due:
            self._write(Tenant.SNAPSHOT, place.snapshots[at], request, at)
        self.manager.note_launched(request)

    def prefill(self, request: Request) -> None:
        """Run the whole prompt."""
        assert self.compute(request, request.num_tokens)

    def decode(self, request: Request, tokens: tuple[int, ...]) -> None:
        """Append tokens, and compute each in a step of its own, but the last."""
        for token in tokens:
            if request.num_computed_tokens < request.num_tokens:
                assert self.compute(request, request.num_tokens)
            request.generated.append(token)

    def finish(self, request: Request, *, keep: bool = True) -> None:
        self.manager.close(request, keep=keep)
        del self.open[request.id]

    def serve(self, prompt: tuple[int, ...], *, output: tuple[int, ...] = (), **options) -> int:
        """Run a request from its beginning to its end; returns the tokens that it found."""
        request = self.request(prompt, **options)
        hit = self.start(request)
        assert hit is not None
        self.prefill(request)
        self.decode(request, output)
        self.finish(request)
        return hit

    def check(self) -> None:
        """Check what must hold between any two calls."""
        for request in self.open.values():
            self._check_pages(request)
            place = self.manager.placement(request)
            if place.state is not None and request.num_computed_tokens:
                content = (request.salt, request.tokens[: request.num_computed_tokens])
                assert self.memory[Tenant.STATE, place.state] == content
        usage = self.manager.usage()
        in_use = sum(usage.num_slabs) + usage.num_free_slabs
        assert in_use == self.manager.plan.layout.num_usable_slabs
        if self.manager.plan.has_states:
            assert usage.num_items[Tenant.STATE] == len(self.open)

    def check_nothing_is_left(self) -> None:
        """End every request, forget every prefix: all slabs must be free."""
        for request in list(self.open.values()):
            self.finish(request)
        assert sum(self.manager.num_pinned_items()) == 0
        self.manager.clear()
        usage = self.manager.usage()
        assert usage.num_free_slabs == self.manager.plan.layout.num_usable_slabs
        assert sum(usage.num_items) == 0
        host = self.manager.host_usage()
        assert host is None or sum(host.num_items) == 0

    def zero(self) -> None:
        """Clear or fill what was taken since the last time."""
        fresh = self.manager.take_fresh()
        for tenant, device, host in fresh.saved:
            # What lay in the same slab under another tenant is gone.
            _forget_others(self.manager.plan.host, self.host, tenant, host)
            self.host[tenant, host] = self.memory[tenant, device]
        for state in fresh.states:
            self.memory[Tenant.STATE, state] = None
        for page in fresh.pages:
            self.memory[Tenant.PAGE, page] = None
        for tenant, device, host in fresh.loaded:
            self._overwrite(tenant, device)
            self.memory[tenant, device] = self.host[tenant, host]

    def _write(self, tenant: Tenant, index: int, request: Request, end: int) -> None:
        layout = self.manager.plan.layout
        assert SINK < index // layout.places[tenant] < layout.num_slabs
        self._overwrite(tenant, index)
        self.memory[tenant, index] = (request.salt, request.tokens[:end])

    def _overwrite(self, tenant: Tenant, index: int) -> None:
        """What lay in the same slab under another tenant is gone."""
        _forget_others(self.manager.plan.layout, self.memory, tenant, index)

    def _check_pages(self, request: Request) -> None:
        if not self.manager.plan.has_pages:
            return
        computed = request.num_computed_tokens
        for block, page in enumerate(self.manager.pages(request)):
            end = min(computed, (block + 1) * P)
            if end > block * P:
                content = (request.salt, request.tokens[:end])
                assert self.memory[Tenant.PAGE, page] == content


def _forget_others(layout: ArenaLayout, memory: dict, tenant: Tenant, index: int) -> None:
    """What lay in an item's slab under another tenant is gone."""
    places = layout.places
    slab = index // places[tenant]
    for other in Tenant:
        if other is not tenant:
            for at in range(slab * places[other], (slab + 1) * places[other]):
                memory.pop((other, at), None)
