"""A request checks what its caller asks for."""

import pytest

from sevenfold.engine.request import Request, Status
from sevenfold.engine.token_ids import TokenIds


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"id": ""}, "id must have one character or more, got ''"),
        ({"prompt": ()}, "prompt must have at least one token"),
        ({"max_tokens": 0}, "max_tokens must be 1 or more, got 0"),
        ({"deadline_s": float("nan")}, "deadline_s must be finite or None, got nan"),
        ({"draft_tokens": -1}, "draft_tokens must be 0 or more, got -1"),
        ({"marks": (0, 2)}, r"marks must rise from 1 or more to 3 or fewer, got \(0, 2\)"),
        ({"marks": (2, 4)}, "marks must rise"),
        ({"marks": (2, 2)}, "marks must rise"),
    ],
)
def test_faults_are_named(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Request(**({"id": "a", "prompt": (1, 2, 3), "max_tokens": 1} | fields))


def test_a_new_request_has_its_prompt_and_nothing_computed() -> None:
    request = Request("a", (1, 2, 3), 4, marks=(1, 3))
    assert (request.tokens, request.num_tokens, request.num_remaining_tokens) == ((1, 2, 3), 3, 4)
    assert (request.status, request.num_computed_tokens) == (Status.WAITING, 0)
    request.generated.append(9)
    assert (request.tokens, request.num_tokens, request.num_remaining_tokens) == (
        (1, 2, 3, 9),
        4,
        3,
    )


def test_equal_requests_are_two() -> None:
    assert Request("a", (1,), 1) != Request("a", (1,), 1)


@pytest.mark.parametrize("first", range(6))
@pytest.mark.parametrize("end", range(8))
def test_some_tokens_are_those_of_all(first: int, end: int) -> None:
    request = Request("a", (5, 6, 7), 9)
    request.generated += [8, 9]
    assert request.tokens_between(first, end) == request.tokens[first:end]


@pytest.mark.parametrize("prompt", [(1.5,), (1, 2.0), ("a",), (None,)])
def test_a_prompt_of_anything_but_integers(prompt: tuple[object, ...]) -> None:
    with pytest.raises(TypeError, match="prompt must hold integers alone"):
        Request("a", prompt, 1)  # type: ignore[arg-type]


@pytest.mark.parametrize("prompt", [(1, -1), (3, 1 << 32)])
def test_a_prompt_of_what_is_no_id(prompt: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"from 0 to 2\*\*32 - 1, got {min(prompt)} to"):
        Request("a", prompt, 1)


def test_a_prompt_is_packed() -> None:
    assert Request("a", (1, 2, 0xFFFF_FFFF), 1).packed == b"\1\0\0\0\2\0\0\0\xff\xff\xff\xff"


def test_ids_that_are_packed_already_are_taken_as_they_are() -> None:
    ids = TokenIds([1, 2, 0xFFFF_FFFF])
    assert ids == (1, 2, 0xFFFF_FFFF)
    request = Request("a", ids, 1)
    assert request.prompt is ids
    assert request.packed is ids.packed
    with pytest.raises(ValueError, match="got -1 to 2"):
        TokenIds([2, -1])
