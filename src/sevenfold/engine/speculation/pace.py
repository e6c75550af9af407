"""When drafting pays: what steps with drafts cost, how many guesses are right, and what is lost."""

from dataclasses import dataclass, field

# Averages forget what is older than about 1 / WEIGHT samples.
STEP_WEIGHT, GAIN_WEIGHT = 0.1, 0.3
# A single sample counts as this many times the average at most: a pause of the machine.
MOST_TIMES = 4.0
# Steps without drafts that are timed before any is drafted, and after how many with drafts again.
FEWEST_SAMPLES, MOST_AGE = 2, 64
# What a step with drafts costs before one has been timed, in steps without; and what the first
# that is timed counts as at most, as much as the longest draft can give.
PRIOR_COST, MOST_COST = 1.25, 16.0
# Guesses that must have been right in a row before any is paid for: at first, and at most after
# drafts that did not pay, each of which doubles it.
FIRST_RUN, LONGEST_RUN = 2, 32
# A draft of which nothing is right may be chance; two in a row say that the text has changed.
MOST_MISSES = 2
# Steps' worth of time that failed drafts may cost: at the beginning, for each step that is taken,
# and at most once more has been saved.
FIRST_CREDIT, CREDIT_RATE, MOST_CREDIT = 2.0, 0.02, 64.0


@dataclass
class _Mean:
    """A moving average of seconds."""

    value: float = 0.0
    num_samples: int = 0

    def add(self, seconds: float) -> float:
        """Add a sample; returns what it counted as."""
        if self.num_samples:
            seconds = min(seconds, MOST_TIMES * self.value)
        self.num_samples += 1
        self.value += max(STEP_WEIGHT, 1 / self.num_samples) * (seconds - self.value)
        return seconds


@dataclass
class _Timed:
    """Steps of one number of rows, and those with drafts by their tokens.

    warmed: sizes of drafts of which one was taken, 0 for none: what happens once happened then.
    """

    plain: _Mean = field(default_factory=_Mean)
    drafted: dict[int, _Mean] = field(default_factory=dict)
    warmed: set[int] = field(default_factory=set)
    plain_age: int = 0


class StepTimes:
    """Seconds of decoding steps, by their rows and by the guesses of their longest draft.

    Both in powers of two, as steps are recorded.
    """

    def __init__(self) -> None:
        self._timed: dict[int, _Timed] = {}
        self._has_failed = False

    def note_plain(self, num_rows: int, seconds: float) -> None:
        """Add a step of so many rows without drafts, but the first."""
        timed = self._of(num_rows)
        if 0 in timed.warmed:
            timed.plain.add(seconds)
            timed.plain_age = 0
        timed.warmed.add(0)

    def note_drafted(self, num_rows: int, num_guesses: int, seconds: float) -> float | None:
        """Add a step with drafts, but the first of its size, in which things may happen once.

        Returns:
            What it counts as, in steps without drafts; None where that is not known.
        """
        timed, size = self._of(num_rows), num_guesses.bit_length()
        timed.plain_age += 1
        if size not in timed.warmed:
            timed.warmed.add(size)
            return None
        drafted = timed.drafted.setdefault(size, _Mean())
        if not drafted.num_samples and timed.plain.value:
            seconds = min(seconds, MOST_COST * timed.plain.value)
        return self.in_steps(num_rows, drafted.add(seconds))

    def note_failed(self, num_rows: int, seconds: float) -> float:
        """Add guessing from which no draft was taken; returns what it counts as, in steps.

        All of it, but for the first time, in which things may happen once.
        """
        steps = self.in_steps(num_rows, seconds)
        if not steps:
            return 0.0
        is_first, self._has_failed = not self._has_failed, True
        return min(steps, MOST_COST) if is_first else steps

    def in_steps(self, num_rows: int, seconds: float) -> float | None:
        """Return seconds in steps of so many rows without drafts, if their time is known."""
        plain = self._of(num_rows).plain.value
        return seconds / plain if plain else None

    def cost(self, num_rows: int, num_guesses: int) -> float:
        """Return what a step with drafts costs, in steps without."""
        timed = self._of(num_rows)
        size = num_guesses.bit_length()
        # A size that was not timed costs what a smaller one does, or more.
        known = max((s for s in timed.drafted if s <= size), default=None)
        if not timed.plain.value or known is None:
            return PRIOR_COST
        return timed.drafted[known].value / timed.plain.value

    def wants_plain(self, num_rows: int) -> bool:
        """Whether a step without drafts is to be timed now."""
        timed = self._of(num_rows)
        return timed.plain.num_samples < FEWEST_SAMPLES or timed.plain_age >= MOST_AGE

    def _of(self, num_rows: int) -> _Timed:
        return self._timed.setdefault(num_rows.bit_length(), _Timed())


@dataclass
class Allowance:
    """What failed drafts may still cost, in steps: one for all requests of an engine.

        lost <= FIRST_CREDIT + CREDIT_RATE * steps + what one draft can lose

    Time that drafts save is credit, too, up to MOST_CREDIT.
    """

    credit: float = FIRST_CREDIT

    def earn(self) -> None:
        """Note a step that was taken."""
        self.spend(-CREDIT_RATE)

    def spend(self, lost: float) -> None:
        """Note what a step cost beyond the tokens that it gave; less than nothing if it saved."""
        self.credit = min(MOST_CREDIT, self.credit - lost)

    @property
    def allows(self) -> bool:
        """Whether a draft may be taken that should pay."""
        return self.credit > 0

    @property
    def allows_try(self) -> bool:
        """Whether a draft may be taken that should not pay by what is known."""
        return self.credit >= FIRST_CREDIT


@dataclass
class Pace:
    """How many guesses of a request are right.

    gain: accepted guesses of a draft, on average.
    run: guesses that were right in a row up to now.
    needed: what a run must have for it to count.
    misses: the last drafts of which nothing was right.
    """

    gain: float = 0.0
    run: int = 0
    needed: int = FIRST_RUN
    misses: int = 0

    @property
    def expected(self) -> float:
        """Guesses that will be right in a row now: the average, or as many as were right so far."""
        average = self.gain if self.misses < MOST_MISSES else 0.0
        return max(average, self.run if self.run >= self.needed else 0)

    def num_draft_tokens(self, most: int) -> int:
        """Return how many guesses to ask for: about twice what is expected, one at least."""
        return min(most, 1 + round(2 * self.expected))

    def follow(self, num_right: int) -> None:
        """Note guesses that were right, whose draft goes on."""
        self.run += num_right

    def observe(self, num_right: int, *, is_whole: bool) -> None:
        """Note the end of a draft: how many of its guesses were right, and whether all were.

        Their run is noted already.
        """
        self.gain += GAIN_WEIGHT * (num_right - self.gain)
        self.misses = 0 if num_right else self.misses + 1
        if not is_whole:
            self.run = 0

    def judge(self, *, paid: bool) -> None:
        """Note whether a draft that was paid for paid."""
        self.needed = FIRST_RUN if paid else min(2 * self.needed, LONGEST_RUN)
