"""What happens once in a check of drafts on a CPU happens before a request waits for it."""

import re
from collections.abc import Callable

import numba
import pytest
import torch
from engine_helpers import tiny_model, uncached
from speculation_helpers import TREE, build, repeating, run, submit, tokens
from tokenizers import Tokenizer

from sevenfold.engine.memory_layout import SINK
from sevenfold.engine.warm_up import WarmUpStoppedError
from sevenfold.ops.lightning import compiled_replay


def test_on_a_cpu_drafts_are_checked_once_so_that_no_request_compiles(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds: set[tuple[object, ...]] = set()
    for name in ("_verify", "_commit"):
        loop = getattr(compiled_replay, name)

        def watched(*arrays: object, name: str = name, loop: Callable[..., None] = loop) -> None:
            kinds.add((name, *map(numba.typeof, arrays)))
            loop(*arrays)

        monkeypatch.setattr(compiled_replay, name, watched)
    engine = build(tiny_model("lsf", max_position_embeddings=200), tokenizer, TREE)
    storage = engine._worker.storage
    slabs = storage._arena.view(-1, storage.layout.slab_bytes)
    slabs[SINK + 1 :] = 7
    lines: list[str] = []
    engine.warm_up(lines.append)
    assert re.fullmatch(r"the check of drafts ready after \d+\.\d s", *lines)
    assert bool((slabs[SINK + 1 :] == 7).all())
    assert not engine._worker._pending._accepted
    first = set(kinds)
    assert {kind[0] for kind in first} == {"_verify", "_commit"}
    slabs[SINK + 1 :] = 0
    for n, text in enumerate(texts := repeating(0, [1, 70, 17, 40])):
        submit(engine, str(n), text, 24)
    events = run(engine)
    for n, text in enumerate(texts):
        assert tokens(events[str(n)]) == uncached(engine._worker.model, text, 24)
    assert engine.speculation_counters().num_accepted_tokens > 0
    assert kinds == first
    # And stopped: not even one.
    kinds.clear()
    engine.stop_warm_up()
    with pytest.raises(WarmUpStoppedError):
        engine.warm_up(lines.append)
    assert not kinds


def test_a_tree_of_another_layout_is_not_compiled_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    layouts: list[object] = []
    monkeypatch.setattr(
        compiled_replay, "_verify", lambda *arrays: layouts.append(numba.typeof(arrays[10]))
    )
    B, T, H, K, R = 1, 4, 2, 8, 32
    q = torch.zeros(B, T, H, K)
    pool = (torch.zeros(3, H, K, K), *[torch.zeros(3, H, R, K)] * 2, torch.zeros(3, H).int())
    sees = torch.ones(B, T, T).tril().bool()
    for ancestors in (None, sees, sees.repeat(1, 1, 2)[:, :, ::2], sees.mT):
        compiled_replay.verify(
            q, q, q, torch.zeros(H), pool, torch.tensor([1]), None, ancestors, 1.0
        )
    assert len(layouts) == 4
    assert len(set(layouts)) == 1
