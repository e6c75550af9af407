"""Needle recall by generation: what a model can still find of what it has read.

    python examples/real_text/recall.py runs/real-text-hybrid/final --data data/real-text/tokens

Two tasks over lengths and depths, answers generated greedily by the engine. A number: "The secret
number of Norwich is 4821937." lies in held-out text, whose end asks "The secret number of Norwich
is". A passage: 48 tokens of other text lie there, and the end repeats the first 16 of them. The
score is the share of the answer's first tokens that are right in order, and of answers that are
right whole. Writes recall.json beside the checkpoint.
"""

import argparse
import json
import random
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from sevenfold import LLM, SamplingParams
from sevenfold.data import TokenDataset

PLACES = ("Norwich", "Lisbon", "Quebec", "Kyoto", "Tunis", "Bergen", "Lima", "Delhi")
PASSAGE_TOKENS, CUE_TOKENS, ANSWER_TOKENS = 48, 16, 16


@dataclass(frozen=True)
class Question:
    """One prompt and the tokens that answer it; depth is the needle's place, 0 to 1."""

    task: str
    length: int
    depth: float
    prompt: tuple[int, ...]
    answer: tuple[int, ...]


def questions(
    haystack: np.ndarray, encode, lengths: Sequence[int], depths: Sequence[float], trials: int
) -> list[Question]:
    """Build both tasks' questions, the same for every model.

    Args:
        haystack: held-out tokens, longer than any prompt.
        encode: text to ids.
        lengths: tokens of a prompt.
        depths: where the needle lies.
        trials: questions of each task, length and depth.
    """
    found = []
    chosen = random.Random(0)
    for length in lengths:
        for depth in depths:
            for trial in range(trials):
                place = PLACES[trial % len(PLACES)]
                number = "".join(chosen.choice("0123456789") for _ in range(7))
                cue = f" The secret number of {place} is"
                needle, answer = encode(f"{cue} {number}.\n"), encode(f" {number}")
                found.append(
                    _question(
                        "number", haystack, length, depth, chosen, needle, encode(cue), answer
                    )
                )
                at = chosen.randrange(len(haystack) - PASSAGE_TOKENS)
                passage = haystack[at : at + PASSAGE_TOKENS].tolist()
                cue_ids = passage[:CUE_TOKENS]
                answer = passage[CUE_TOKENS : CUE_TOKENS + ANSWER_TOKENS]
                found.append(
                    _question("passage", haystack, length, depth, chosen, passage, cue_ids, answer)
                )
    return found


def _question(
    task: str,
    haystack: np.ndarray,
    length: int,
    depth: float,
    chosen: random.Random,
    needle: Sequence[int],
    cue: Sequence[int],
    answer: Sequence[int],
) -> Question:
    room = length - len(needle) - len(cue)
    if room < 1:
        raise SystemExit(f"lengths must leave room for the needle, got {length}")
    start = chosen.randrange(len(haystack) - room)
    text = haystack[start : start + room].tolist()
    at = round(depth * room)
    prompt = [*text[:at], *needle, *text[at:], *cue]
    return Question(task, length, depth, tuple(prompt), tuple(answer))


def score(answer: Sequence[int], generated: Sequence[int]) -> float:
    """Return the share of an answer's tokens that come first and right."""
    right = 0
    for wanted, found in zip(answer, generated, strict=False):
        if wanted != found:
            break
        right += 1
    return right / len(answer)


def ask(llm: LLM, asked: Sequence[Question]) -> list[float]:
    """Generate every answer and score it."""
    scores = []
    for question in asked:
        params = SamplingParams(max_tokens=len(question.answer), temperature=0.0, ignore_eos=True)
        [out] = llm.generate([list(question.prompt)], params)
        scores.append(score(question.answer, out.token_ids))
    return scores


def table(asked: Sequence[Question], scores: Sequence[float]) -> list[dict]:
    """Return one row for each task, length and depth."""
    cells: dict[tuple[str, int, float], list[float]] = {}
    for question, value in zip(asked, scores, strict=True):
        cells.setdefault((question.task, question.length, question.depth), []).append(value)
    return [
        {
            "task": task,
            "length": length,
            "depth": depth,
            "share_right": statistics.fmean(values),
            "all_right": statistics.fmean(value == 1.0 for value in values),
            "questions": len(values),
        }
        for (task, length, depth), values in cells.items()
    ]


def main() -> None:
    """Ask one checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048, 4000])
    parser.add_argument("--depths", type=float, nargs="+", default=[0.0, 0.25, 0.5, 0.75, 1.0])
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    dtype = torch.bfloat16 if arguments.device.startswith("cuda") else None
    llm = LLM(arguments.checkpoint, device=arguments.device, dtype=dtype)
    data = TokenDataset.open(arguments.data, "validation")
    haystack = np.concatenate([data.document(i) for i in range(data.num_documents)]).astype(
        np.int64
    )
    asked = questions(
        haystack,
        lambda text: llm.tokenizer.encode(text, add_special_tokens=False).ids,
        arguments.lengths,
        arguments.depths,
        arguments.trials,
    )
    rows = table(asked, ask(llm, asked))
    out = arguments.out or arguments.checkpoint.parent / "recall.json"
    example = asdict(asked[0]) | {"prompt": f"{len(asked[0].prompt)} tokens"}
    out.write_text(json.dumps({"rows": rows, "example": example}, indent=1) + "\n")
    for row in rows:
        print(
            f"{row['task']:>8} {row['length']:>6} at {row['depth']:.2f}: "
            f"{row['share_right']:.0%} of tokens, {row['all_right']:.0%} whole"
        )
    print(f"written to {out}")


if __name__ == "__main__":
    main()
