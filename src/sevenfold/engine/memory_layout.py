"""How one arena of bytes is cut: slabs of equal size, and what fits into a slab."""

from dataclasses import dataclass
from enum import IntEnum

SINK = 0  # the slab, and so the state, the page and the snapshot, that nobody is ever given


class Tenant(IntEnum):
    """What a slab holds while it is not free."""

    STATE = 0
    PAGE = 1
    SNAPSHOT = 2


@dataclass(frozen=True)
class ArenaLayout:
    """An arena of slabs; places[tenant] items of a tenant fit into a slab, 0 if it has none.

    Item i of a tenant begins at byte i * stride_bytes(tenant), i = slab * places + place: so a
    strided view of the arena is one tenant's pool. Slab 0 is the sink: padding rows write there.
    """

    num_slabs: int
    slab_bytes: int
    places: tuple[int, int, int]

    def __post_init__(self) -> None:
        if self.num_slabs < 2:
            raise ValueError(f"num_slabs must be 2 or more, got {self.num_slabs}")
        uneven = [n for n in self.places if n < 0 or (n and self.slab_bytes % n)]
        if uneven or len(self.places) != len(Tenant):
            raise ValueError(
                f"places must each be 0 or divide slab_bytes = {self.slab_bytes}, got {self.places}"
            )

    @property
    def num_usable_slabs(self) -> int:
        """All but the sink."""
        return self.num_slabs - 1

    def stride_bytes(self, tenant: Tenant) -> int:
        """Distance between the beginnings of two neighbouring items; 0 for no items."""
        places = self.places[tenant]
        return self.slab_bytes // places if places else 0

    def num_slabs_for(self, tenant: Tenant, num_items: int) -> int:
        """Slabs that so many items take, when they share slabs as well as they can."""
        return -(-num_items // self.places[tenant]) if self.places[tenant] else 0
