"""What Python's garbage collector need not look at again."""

import gc


def freeze_heap() -> None:
    """Collect garbage, and leave all that is left out of later collections.

    For a process that is ours, once it is warm: what libraries and models keep stays to its end,
    and a full collection, which stops every request, walks all of it. CPython: gc.freeze.
    """
    gc.collect()
    gc.freeze()
