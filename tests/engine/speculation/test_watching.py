"""Guesses that nothing checks are made while the device computes, for those that still decode."""

from collections.abc import Callable, Sequence

from sevenfold.engine.request import Request, Status
from sevenfold.engine.sampling import Output, Sampler, SamplingParams
from sevenfold.engine.speculation.config import PromptLookupConfig
from sevenfold.engine.speculation.drafter import Ask, Paths
from sevenfold.engine.speculation.speculator import Speculator


class Watched:
    """A way to guess that notes whom it was asked for."""

    is_free = True

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def warm_up(self, stopped: Callable[[], bool]) -> None:
        raise AssertionError

    def read(self, requests: Sequence[Request], num_computed: int) -> None:
        pass

    def propose(self, asks: Sequence[Ask]) -> list[Paths]:
        self.asked.append([ask.request.id for ask in asks])
        return [[[7, 8]] for _ in asks]

    def forget(self, request_id: str) -> None:
        pass


def no_sampler(outputs: Sequence[Output]) -> Sampler:
    raise AssertionError


def deciding(num_requests: int) -> tuple[Speculator, Watched, list[tuple[Request, Output]]]:
    """A speculator and requests that decode, of which nothing is known."""
    drafter, decoding = Watched(), []
    speculator = Speculator(PromptLookupConfig(), drafter, None, no_sampler)  # type: ignore[arg-type]
    for n in range(num_requests):
        request = Request(str(n), (1, 2), 20)
        request.generated.append(3)
        request.status = Status.DECODING
        decoding.append((request, Output(SamplingParams(), request.prompt, (), request.generated)))
    return speculator, drafter, decoding


def test_they_are_made_behind_the_launch_once() -> None:
    speculator, drafter, decoding = deciding(1)
    assert not speculator.propose(decoding)
    assert drafter.asked == [], "a step waits for nothing that nobody checks"
    speculator.read([decoding[0][0]], ())
    speculator.read((), ())
    assert drafter.asked == [["0"]]
    request = decoding[0][0]
    request.generated.append(7)
    speculator.propose(decoding)
    speculator.read([request], ())
    assert drafter.asked == [["0"]], "the guesses go on"
    request.generated.append(9)
    speculator.propose(decoding)
    speculator.read([request], ())
    assert drafter.asked == [["0"], ["0"]], "and are over with the first that is wrong"


def test_many_take_turns() -> None:
    speculator, drafter, decoding = deciding(6)
    for _ in range(3):
        speculator.propose(decoding)
        speculator.read([request for request, _ in decoding], ())
    assert drafter.asked == [["0", "1", "2", "3"], ["4", "5"]]


def test_none_are_kept_for_one_that_has_ended_meanwhile() -> None:
    speculator, drafter, decoding = deciding(2)
    speculator.propose(decoding)
    ended, going = (request for request, _ in decoding)
    ended.status = Status.ENDED
    speculator.forget((), [ended])
    speculator.read([going], ())
    assert drafter.asked == [["1"]]
    assert set(speculator._drafted) == {"1"}
