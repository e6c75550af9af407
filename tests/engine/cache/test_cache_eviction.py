"""The eviction queue against GreedyDual-Size written down literally."""

from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from sevenfold.engine.cache.eviction import EvictionQueue


@dataclass(eq=False)
class Item:
    value: float
    floor: float = 0.0
    ticket: int = 0
    order: int = 0


CALLS = st.lists(
    st.tuples(st.sampled_from(["new", "new", "use", "rise", "remove", "pop"]), st.integers(0, 30)),
    max_size=80,
)


@settings(deadline=None)
@given(calls=CALLS)
def test_the_queue_is_greedy_dual(calls) -> None:
    queue: EvictionQueue[Item] = EvictionQueue(lambda item: item.value)
    inside: list[Item] = []
    floor = 0.0
    for call, number in calls:
        item = inside[number % len(inside)] if inside else None
        if call == "new":
            inside.append(Item(float(number)))
            queue.touch(inside[-1])
        elif call == "pop":
            least = min((i.floor + i.value for i in inside), default=None)
            popped = queue.pop()
            assert (popped is None) == (least is None)
            if popped is not None and least is not None:
                assert popped.floor + popped.value == least
                inside.remove(popped)
                floor = max(floor, least)
        elif item is not None and call == "use":
            queue.touch(item)
            assert item.floor == floor
        elif item is not None and call == "rise":
            # What comes before it in the tree was evicted: it saves more now.
            item.value += number
        elif item is not None:
            queue.remove(item)
            inside.remove(item)
        assert len(queue) == len(inside)
        assert queue.floor == floor
        least = min((i.floor + i.value for i in inside), default=None)
        for value in (0.0, 5.0, 50.0):
            assert queue.outranks_first(value) == (least is not None and least < floor + value)


def test_entries_touched_often_leave_no_trace() -> None:
    queue: EvictionQueue[Item] = EvictionQueue(lambda item: item.value)
    items = [Item(1.0), Item(2.0)]
    for _ in range(10_000):
        for item in items:
            queue.touch(item)
    assert len(queue._heap) < 200
    assert [queue.pop(), queue.pop(), queue.pop()] == [*items, None]


def test_what_is_not_used_goes_although_it_saves_more() -> None:
    queue: EvictionQueue[Item] = EvictionQueue(lambda item: item.value)
    dear = Item(10.0)
    queue.touch(dear)
    popped = []
    while dear not in popped:
        queue.touch(Item(3.0))
        popped.append(queue.pop())
    # 3, 6, 9, and then the next would stand at 12.
    assert len(popped) == 4
