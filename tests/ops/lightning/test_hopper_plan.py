"""How the kernel for Hopper GPUs cuts and deals heads wider than one value tile; no GPU needed."""

import pytest
import torch

pytest.importorskip("triton")

from sevenfold.ops.lightning import segments, triton_launch
from sevenfold.ops.lightning.triton_launch import Scan, plan_scan

H, SMS = 3, 8
LENGTHS = (9000, 5, 2500)


@pytest.fixture(autouse=True)
def _on_hopper(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(triton_launch, "num_sms", lambda _device: SMS)
    monkeypatch.setattr(Scan, "on_hopper", property(lambda _scan: True))
    segments.plan_segments.cache_clear()
    yield
    segments.plan_segments.cache_clear()


def scan(K: int, V: int) -> Scan:
    q, v = (torch.empty(1, sum(LENGTHS), H, width, dtype=torch.bfloat16) for width in (K, V))
    return Scan(q, q, v, torch.empty(H), 1.0, LENGTHS)


@pytest.mark.parametrize(
    ("K", "V", "tiles"), [(128, 128, 1), (256, 128, 1), (128, 136, 2), (256, 256, 2), (8, 256, 2)]
)
def test_every_tile_of_every_head_is_dealt_once(K: int, V: int, tiles: int) -> None:
    plan = plan_scan(scan(K, V))
    assert plan.deal is not None
    works = plan.deal.tolist()[SMS + 1 : -1]
    assert sorted(works) == list(range(len(plan.segments) * H * tiles))


@pytest.mark.parametrize(("K", "V"), [(96, 256), (256, 64), (192, 192), (128, 64)])
def test_a_transpose_shares_the_cuts(K: int, V: int) -> None:
    plan, other = plan_scan(scan(K, V)), plan_scan(scan(V, K))
    assert plan.num_slots > 0
    for name in ("segments", "pieces", "chains"):
        assert torch.equal(getattr(plan, name), getattr(other, name))
