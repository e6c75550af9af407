"""What others wrote, against a served checkpoint: a router, lm-eval, a load generator.

None of them is a dependency: each test runs where the program is on the PATH. `scripts/replicas`,
`scripts/lm_eval` and `scripts/load` run the same, and record what they saw.
"""

import random
import shutil
from pathlib import Path

import pytest
from lm_eval_helpers import evaluate
from load_helpers import PROFILES, load
from process_helpers import save_tiny
from replicas_helpers import KEYS, prove

pytestmark = pytest.mark.slow
OPTIONS = ("--memory-gib", "0.1")


def program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not on the PATH")
    return found


def prose(num_words: int) -> str:
    draw = random.Random(0)
    return " ".join("".join(draw.choices("abcdefgh", k=3)) for _ in range(num_words))


def test_two_replicas_behind_a_router(tmp_path: Path) -> None:
    num = 8
    cases = {one["case"]: one for one in prove([program("vllm-router")], tmp_path, num)}
    for policy in ("cache_aware", "consistent_hash"):
        found = cases[f"conversations, {policy}"]
        assert found["later turns that hit"] == found["later turns"]
    assert min(cases["conversations, round_robin"]["by replica"]) > 0
    assert cases["keys"]["wrong key"] == 401
    first, second, *again = cases["keys"]["cached by key, twice"]
    assert (first, second) == (0, 0)
    assert min(again) > 0
    for lost in ("kill -9 under load", "SIGTERM under load"):
        assert cases[lost]["answered"] == cases[lost]["requests"]


def test_lm_eval_gets_the_model_s_figures(tmp_path: Path) -> None:
    checkpoint = save_tiny(tmp_path / "tiny")
    first, chat = evaluate(checkpoint, program("lm_eval"), tmp_path, prose(480), 8, KEYS[0])
    assert first["accuracy"] == first["accuracy by LLM"]
    assert first["log likelihoods"] == 32
    assert first["largest difference from LLM"] == 0.0
    assert chat["generated"] == 8


def test_guidellm_is_answered(tmp_path: Path) -> None:
    checkpoint = save_tiny(tmp_path / "tiny")
    cases = load(checkpoint, program("guidellm"), tmp_path, prose(256 * 60), *OPTIONS)
    assert [one["failed"] for one in cases] == [0] * len(PROFILES)
    asked = [one["answered"] + one["left"] for one in cases]
    assert asked == [num for _, num in PROFILES.values()]
