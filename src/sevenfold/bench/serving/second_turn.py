"""The second turn of a long chat: time to its first token, beside computing all of it."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import torch

from sevenfold.bench.measure import elapsed_s, interleaved_medians
from sevenfold.bench.peer import peer_prefill
from sevenfold.bench.serving.agreement import check_tokens
from sevenfold.bench.serving.prefill import Report
from sevenfold.bench.serving.sides import Serving, Sides, random_ids
from sevenfold.engine.memory_layout import Tenant
from sevenfold.engine.request import Request
from sevenfold.engine.token_ids import TokenIds
from sevenfold.models.accounting import kv_bytes, state_bytes

_ANSWER_TOKENS = 16
_QUESTION_TOKENS = 64


def run_second_turn(
    sides: Sides,
    lengths: Sequence[int],
    *,
    peer_most_tokens: int,
    repeats: int,
    report: Report,
) -> list[dict[str, Any]]:
    """Time the second turn of chats whose first turn is so long, to its first token.

    Ours, cached: each time another chat, under a salt of its own: its first turn has been served,
    and a question of 64 tokens follows the answer. Nothing of the question is cached, and the chat
    only in whole pages (`cached_tokens`). Ours, again: the question has been asked before, and is
    cached but for its last page. Ids are packed before, as a server's are. Ours, whole: the second
    turn under a salt that has cached nothing. Theirs: a prefill of all of it. The tokens of cached
    turns are checked to be the model's.

    Args:
        sides: checked.
        lengths: of first turns, tokens, 64 or more.
        peer_most_tokens: longer ones are left to our side alone.
        repeats: timed runs of each side.
        report: called with each row as it is done.

    Returns:
        One row a length.
    """
    serving, rows = Serving(sides.model), []
    for length in lengths:
        row = _measure(sides, serving, length, (peer_most_tokens, repeats))
        report(row)
        rows.append(row)
    return rows


def _measure(
    sides: Sides, serving: Serving, length: int, limits: tuple[int, int]
) -> dict[str, Any]:
    peer_most_tokens, repeats = limits
    chat = _Chat(serving, random_ids(sides.config, length).tolist())
    asked = chat.ask_first_turn(b"first")
    held, answer = _held_bytes(serving), asked.generated
    question = random_ids(sides.config, _QUESTION_TOKENS).tolist()
    prompt = TokenIds((*chat.first, *answer, *question))  # as a server has encoded it
    salts = (b"chat %d" % n for n in count())
    runs: dict[str, Callable[[], float]] = {
        "cached": lambda: chat.second_turn_s(next(salts), question),
        "again": partial(_first_token_s, serving, prompt, b"first"),
        "whole": partial(_first_token_s, serving, prompt, None),
    }
    if len(prompt) <= peer_most_tokens:
        ids = torch.tensor([prompt], device=sides.device)
        runs["transformers"] = lambda: elapsed_s(partial(peer_prefill, sides.peer, ids))
    times = interleaved_medians(runs, repeats)
    chat.ask_first_turn(b"checked")
    serving.run()
    cached, again = (_answered(sides, serving, prompt, salt) for salt in (b"checked", b"first"))
    element_bytes = sides.model.dtype.itemsize
    tokens = length + _ANSWER_TOKENS
    accounted = state_bytes(sides.config) + kv_bytes(sides.config, tokens, element_bytes)
    return {
        "case": f"second turn of {length:,}",
        "tokens": len(prompt),
        "cached_tokens": cached,
        "cached_tokens_again": again,
        "ours_s": times["cached"],
        "ours_again_s": times["again"],
        "ours_whole_s": times["whole"],
        "transformers_s": times.get("transformers"),
        "share_of_whole": times["cached"] / times["whole"],
        "share_of_whole_again": times["again"] / times["whole"],
        "request_bytes": held,
        "accounted_bytes": accounted,
    }


@dataclass(frozen=True)
class _Chat:
    """A chat's first turn, which is served under any number of salts."""

    serving: Serving
    first: list[int]

    def ask_first_turn(self, salt: bytes) -> Request:
        """Let it wait for its steps."""
        turn = len(self.first)
        return self.serving.submit(self.first, _ANSWER_TOKENS, salt=salt, turn=turn)

    def second_turn_s(self, salt: bytes, question: Sequence[int]) -> float:
        """Serve both turns; seconds to the second's first token."""
        asked = self.ask_first_turn(salt)
        self.serving.run()  # not weighed: that unpins what stays pinned for the next turn
        prompt = TokenIds((*self.first, *asked.generated, *question))
        return _first_token_s(self.serving, prompt, salt)


def _answered(sides: Sides, serving: Serving, prompt: TokenIds, salt: bytes) -> int:
    """Check the answer to a prompt; how many of its tokens were cached."""
    asked = serving.submit(prompt, _ANSWER_TOKENS, salt=salt)
    serving.run()
    check_tokens(sides.model, prompt, asked.generated)
    return asked.num_cached_tokens


def _first_token_s(serving: Serving, prompt: TokenIds, salt: bytes | None) -> float:
    """Seconds to a turn's first token; what its end takes behind that is no part of them."""
    began = time.perf_counter()
    serving.submit(prompt, _ANSWER_TOKENS, salt=salt)
    next(given for given in serving.steps() if given)
    took = time.perf_counter() - began
    serving.run()
    return took


def _held_bytes(serving: Serving) -> int:
    """Serve what waits; bytes of pages and state that its request held at its end."""
    plan, most = serving.plan, 0
    for _ in serving.steps():
        pinned = serving.engine.cache.num_pinned_items()
        held = pinned[Tenant.PAGE] * plan.page_bytes + pinned[Tenant.STATE] * plan.state_bytes
        most = max(most, held)
    return most
