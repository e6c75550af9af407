"""The parity matrix on a GPU in bf16: tokens differ at near ties alone, and in one mode nowhere."""

import pytest
from matrix import Case
from matrix_bf16 import QUICK, check
from tokenizers import Tokenizer

from sevenfold.engine.device import DeviceRunner

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:.*has no tuning")]


@pytest.mark.parametrize("case", QUICK, ids=str)
def test_tokens(case: Case, tokenizer: Tokenizer) -> None:
    runner = check(case, "cuda:0", tokenizer).engine._worker.runner
    assert isinstance(runner, DeviceRunner)
    assert (runner.capture is not None) == case.graphs
