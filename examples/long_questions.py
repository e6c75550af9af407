"""Build a dataset of long texts that end with questions about them and the answers.

    python examples/long_questions.py --data data/tokens --out data/long-questions

Text comes from the training documents of a prepared dataset, cut into numbered sections and joined
up to a length in tokens. Each answer stands in the text, wherever that is: how a sentence goes on,
which one comes before it, in which section it stands. The same arguments give the same dataset.
Ends with a dataset of `sevenfold data prepare` in OUT/tokens, with the tokenizer of DATA.
"""

import argparse
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sevenfold.data import PrepareConfig, TokenDataset, load_tokenizer, prepare

SECTION_CHARACTERS = 6000
SENTENCE_WORDS = range(10, 41)
CUE_WORDS = 6
QUESTIONS = 8
QUESTION_TOKENS = 256  # room that the text leaves for each

Count = Callable[[str], int]


@dataclass(frozen=True)
class Question:
    """One question, its answer, and the section that has it, from 0."""

    asked: str
    answer: str
    section: int

    def __str__(self) -> str:
        return f"Question: {self.asked}\nAnswer: {self.answer}"


@dataclass(frozen=True)
class LongText:
    """Sections and questions about them."""

    sections: tuple[str, ...]
    questions: tuple[Question, ...]

    def __str__(self) -> str:
        parts = [titled(number, text) for number, text in enumerate(self.sections)]
        return "\n\n".join([*parts, *map(str, self.questions)])


def titled(number: int, section: str) -> str:
    """Return a section under its title; titles count from 1."""
    return f"Section {number + 1}\n\n{section}"


def sections_of(document: str) -> Iterator[str]:
    """Cut a document at paragraph ends into sections of SECTION_CHARACTERS or a little more."""
    held: list[str] = []
    for paragraph in re.split(r"\n\s*\n", document.strip()):
        held.append(paragraph.strip())
        if sum(map(len, held)) >= SECTION_CHARACTERS:
            yield "\n\n".join(held)
            held = []
    if held:
        yield "\n\n".join(held)


def sentences_of(section: str) -> list[str]:
    """Return a section's sentences, each on one line."""
    joined = " ".join(section.split())
    return re.split(r"(?<=[.!?])\s+", joined)


def question(section: int, text: str, whole: str, chosen: random.Random) -> Question | None:
    """Ask about a sentence of a section whose beginning stands once in the text; None without one.

    Args:
        section: its number, from 0.
        text: of the section.
        whole: all sections, each run of spaces one.
        chosen: decides which sentence and which kind of question.
    """
    sentences = sentences_of(text)
    places = list(range(1, len(sentences)))
    chosen.shuffle(places)
    for place in places:
        words = sentences[place].split(" ")
        cue = " ".join(words[:CUE_WORDS])
        if len(words) not in SENTENCE_WORDS or whole.count(cue) != 1:
            continue
        kind = chosen.randrange(3)
        if kind == 0:
            rest = " ".join(words[CUE_WORDS:])
            return Question(f'How does the sentence go on that begins "{cue}"?', rest, section)
        if kind == 1:
            before = sentences[place - 1]
            if len(before.split(" ")) not in SENTENCE_WORDS:
                continue
            asked = f'Which sentence comes before the one that begins "{cue}"?'
            return Question(asked, before, section)
        asked = f'Which section has the sentence that begins "{cue}"?'
        return Question(asked, f"Section {section + 1}", section)
    return None


def ask(sections: Sequence[str], count: int, chosen: random.Random) -> tuple[Question, ...]:
    """Ask count questions, spread over the sections from first to last, in another order."""
    whole = " ".join(" ".join(section.split()) for section in sections)
    found = []
    for number in range(count):
        section = int((number + chosen.random()) / count * len(sections))
        asked = question(section, sections[section], whole, chosen)
        if asked is not None and asked not in found:
            found.append(asked)
    chosen.shuffle(found)
    return tuple(found)


def long_texts(
    sections: Iterator[str], length: int, count: Count, chosen: random.Random
) -> Iterator[LongText]:
    """Join sections to texts of at most `length` tokens with their questions, as long as they last.

    Args:
        sections: each goes into one text.
        length: tokens, the end of text included.
        count: tokens of a text.
        chosen: decides what is asked.
    """
    held: list[str] = []
    room = length - 1 - QUESTIONS * QUESTION_TOKENS
    for section in sections:
        tokens = count(titled(len(held), section) + "\n\n")
        if held and tokens > room:
            yield _fitting(LongText(tuple(held), ask(held, QUESTIONS, chosen)), length, count)
            held, room = [], length - 1 - QUESTIONS * QUESTION_TOKENS
            tokens = count(titled(0, section) + "\n\n")
        if tokens <= room:
            held.append(section)
            room -= tokens


def _fitting(text: LongText, length: int, count: Count) -> LongText:
    """Without the last questions, where they are longer than the room that was left for them."""
    while count(str(text)) + 1 > length and text.questions:
        text = LongText(text.sections, text.questions[:-1])
    return text


def build(data: Path, out: Path, *, lengths: Sequence[int], documents: int, seed: int) -> int:
    """Write OUT/documents.jsonl and the dataset OUT/tokens; returns the number of texts.

    Args:
        data: dataset whose training documents are the text.
        out: folder to create.
        lengths: most tokens of a text, one after another; each begins with the first document.
        documents: most texts of each length.
        seed: any integer.
    """
    dataset, tokenizer = TokenDataset.open(data, "train"), load_tokenizer(data)
    chosen, made = random.Random(seed), 0

    def count(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False).ids)

    def sections() -> Iterator[str]:
        order = list(range(dataset.num_documents))
        random.Random(seed).shuffle(order)
        for number in order:
            yield from sections_of(tokenizer.decode(dataset.document(number)[:-1].tolist()))

    out.mkdir(parents=True, exist_ok=True)
    with (out / "documents.jsonl").open("w", encoding="utf-8") as lines:
        for length in lengths:
            texts = long_texts(sections(), length, count, chosen)
            for _, text in zip(range(documents), texts, strict=False):
                if text.questions:
                    lines.write(json.dumps({"text": str(text), "length": length}) + "\n")
                    made += 1
    if made == 0:
        raise SystemExit(
            f"--lengths must have one that the text of {data} fills, got "
            f"{', '.join(map(str, lengths))}"
        )
    prepare(
        PrepareConfig(
            sources=(out / "documents.jsonl",),
            out=out / "tokens",
            tokenizer=data,
            end_of_text=dataset.manifest.end_of_text,
            validation_fraction=0.0,
        )
    )
    return made


def main() -> None:
    """Build one dataset."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    lengths = [2**15, 2**17, 2**19, 2**20]
    parser.add_argument("--lengths", type=int, nargs="+", default=lengths)
    parser.add_argument("--documents", type=int, default=256, help="most texts of each length")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    made = build(
        given.data, given.out, lengths=given.lengths, documents=given.documents, seed=given.seed
    )
    print(f"{made} texts: {given.out / 'tokens'}")


if __name__ == "__main__":
    main()
