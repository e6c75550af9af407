"""What only a GPU shows of verification: graphs, and that nothing waits."""

from collections.abc import Callable

import pytest
import torch
from engine_helpers import MOE, tiny_model, uncached
from speculation_helpers import CHAIN, TREE, build, repeating, run, submit, tokens
from tokenizers import Tokenizer
from verifier_bench import CHAINS, TREES, Bench, real_rows

from sevenfold.engine.device import CudaCapture, DeviceVerifier
from sevenfold.engine.speculation.tree import DraftTree
from sevenfold.models import HybridModel

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:.*has no tuning")]
GPU = torch.device("cuda", 0)
MIXES = ["ll", "ff", "lsf", "lllf"]
WIDTHS = {"hidden_size": 64, "head_dim": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
WIDTHS |= {"intermediate_size": 64, "rotary_dim": 32, "max_position_embeddings": 400}
SHAPES = pytest.mark.parametrize("trees", [CHAINS, TREES], ids=["chains", "trees"])


def gpu_model(mix: str, dtype: torch.dtype = torch.bfloat16) -> HybridModel:
    fields = {"moe": MOE} if mix == "moe" else {}
    return tiny_model("llf" if mix == "moe" else mix, dtype=dtype, **WIDTHS, **fields).to(GPU)


@pytest.mark.parametrize("mode", [CHAIN, TREE], ids=["chain", "tree"])
@pytest.mark.parametrize("mix", MIXES)
def test_the_engine_gives_the_same_tokens_in_fp32(mix: str, mode, tokenizer: Tokenizer) -> None:
    model, twin = gpu_model(mix, torch.float32), tiny_model(mix, **WIDTHS)
    texts = repeating(0, [1, 70, 17, 40])
    engine = build(model, tokenizer, mode, max_running=5)
    assert isinstance(engine._worker._verifier, DeviceVerifier)
    for n, text in enumerate(texts):
        submit(engine, str(n), text, 64)
    events = run(engine)
    found = [tokens(events[str(n)]) for n in range(len(texts))]
    assert found == [uncached(twin, text, 64) for text in texts]
    assert engine.speculation_counters().num_accepted_tokens > 0


@SHAPES
@pytest.mark.parametrize("mix", [*MIXES, "moe"])
def test_a_graph_gives_the_bits_of_the_same_run_without(mix: str, trees: list[DraftTree]) -> None:
    found = []
    for capture in (None, CudaCapture(GPU)):
        bench = Bench(gpu_model(mix), (2,), trees, capture)
        drafts = bench.start([0, 1])
        rows = [real_rows(bench.device.run(drafts), drafts).clone()]
        bench.device.accept([(draft, [0, 1]) for draft in drafts])
        rows.append(real_rows(bench.device.run(drafts), drafts).clone())
        found.append(rows)
    for plain, graphed in zip(*found, strict=True):
        assert torch.equal(plain, graphed)


@SHAPES
@pytest.mark.parametrize("mix", [*MIXES, "moe"])
def test_nothing_waits_inside_a_verification(mix: str, trees: list[DraftTree]) -> None:
    bench = Bench(gpu_model(mix), (4,), trees, CudaCapture(GPU))
    drafts = bench.start([0, 1])

    def check() -> None:
        bench.device.run(drafts)
        bench.device.accept([(draft, [0, len(draft.tree)]) for draft in drafts])

    after_warm_up(check)


def after_warm_up(call: Callable[[], object]) -> None:
    """Call it until kernels are compiled and recorded, then without waiting."""
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
