"""Which partly filled slab to fill next: the fullest, so that others run empty and come free."""


class FullestFirst:
    """Numbers of slabs by how many places they have free; every operation is O(1)."""

    def __init__(self, places: int) -> None:
        # Dictionaries as ordered sets; bit f of the mask says that buckets[f] holds something.
        self._buckets: list[dict[int, None]] = [{} for _ in range(places + 1)]
        self._mask = 0

    def add(self, slab: int, num_free: int) -> None:
        """Note a slab; a full one is not worth noting."""
        if num_free:
            self._buckets[num_free][slab] = None
            self._mask |= 1 << num_free

    def remove(self, slab: int, num_free: int) -> None:
        """Forget a slab that has been added with that number."""
        if num_free:
            bucket = self._buckets[num_free]
            del bucket[slab]
            if not bucket:
                self._mask &= ~(1 << num_free)

    def first(self) -> int | None:
        """Return a slab with the fewest free places, or None."""
        if not self._mask:
            return None
        lowest = (self._mask & -self._mask).bit_length() - 1
        return next(iter(self._buckets[lowest]))
