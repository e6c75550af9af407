"""A tiny random model behind the server, with a tokenizer of bytes."""

from collections.abc import Iterator

import pytest
import torch
from server_helpers import make_llm

from sevenfold.engine import LLM


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def llm() -> LLM:
    return make_llm()


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
