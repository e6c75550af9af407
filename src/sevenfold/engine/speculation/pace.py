"""When drafting pays: what steps with drafts cost, and how many guesses are right."""

from dataclasses import dataclass, field

# Averages forget what is older than about 1 / WEIGHT samples.
STEP_WEIGHT, GAIN_WEIGHT = 0.1, 0.3
# A single sample counts as this many times the average at most: a pause of the machine.
MOST_TIMES = 4.0
# Steps without drafts that are timed before any is drafted, and after how many with drafts again.
FEWEST_SAMPLES, MOST_AGE = 2, 64
# What a step with drafts costs before one has been timed, in steps without.
PRIOR_COST = 1.25
# Tokens until a request that rests is tried again; twice as many each time that it did not pay.
FIRST_REST_TOKENS, LONGEST_REST_TOKENS = 16, 1024
# It has recovered once it gains so many times what it costs.
RECOVERED = 1.1


@dataclass
class _Mean:
    """A moving average of seconds."""

    value: float = 0.0
    num_samples: int = 0

    def add(self, seconds: float) -> None:
        if self.num_samples:
            seconds = min(seconds, MOST_TIMES * self.value)
            self.value += max(STEP_WEIGHT, 1 / (self.num_samples + 1)) * (seconds - self.value)
        else:
            self.value = seconds
        self.num_samples += 1


@dataclass
class _Timed:
    plain: _Mean = field(default_factory=_Mean)
    drafted: _Mean = field(default_factory=_Mean)
    plain_age: int = 0


class StepTimes:
    """Seconds of decoding steps with drafts and without, by the number of their rows."""

    def __init__(self) -> None:
        self._timed: dict[int, _Timed] = {}

    def note(self, num_rows: int, seconds: float, *, drafted: bool) -> None:
        """Add a step of so many rows."""
        timed = self._of(num_rows)
        (timed.drafted if drafted else timed.plain).add(seconds)
        timed.plain_age = timed.plain_age + 1 if drafted else 0

    def cost(self, num_rows: int) -> float:
        """Return what a step with drafts costs, in steps without."""
        timed = self._of(num_rows)
        if not timed.plain.value or not timed.drafted.num_samples:
            return PRIOR_COST
        return timed.drafted.value / timed.plain.value

    def wants_plain(self, num_rows: int) -> bool:
        """Whether a step without drafts is to be timed now."""
        timed = self._of(num_rows)
        return timed.plain.num_samples < FEWEST_SAMPLES or timed.plain_age >= MOST_AGE

    def _of(self, num_rows: int) -> _Timed:
        return self._timed.setdefault(num_rows.bit_length(), _Timed())


@dataclass
class Pace:
    """How much to draft for one request.

        draft while 1 + gain >= cost        gain: accepted guesses of a draft, on average

    One whose drafts stop to pay rests, twice as long each time, and is then tried with one draft.

    gain: it begins at one, so that a text is tried a few times.
    resting: tokens until it is tried.
    """

    gain: float = 1.0
    resting: int = 0
    rest_tokens: int = FIRST_REST_TOKENS

    def num_draft_tokens(self, most: int) -> int:
        """Return how many guesses to ask for now: about twice what is accepted."""
        return 0 if self.resting > 0 else min(most, 1 + round(2 * self.gain))

    def rest(self, num_tokens: int) -> None:
        """Note tokens that came without a draft."""
        self.resting = max(0, self.resting - num_tokens)

    def observe(self, num_accepted: int, cost: float) -> None:
        """Note how many guesses of a draft were right, and what the step cost."""
        self.gain += GAIN_WEIGHT * (num_accepted - self.gain)
        if 1 + self.gain < cost:
            self.resting = self.rest_tokens
            self.rest_tokens = min(2 * self.rest_tokens, LONGEST_REST_TOKENS)
            # On the brink, so that the next try decides.
            self.gain = cost - 1
        elif 1 + self.gain > RECOVERED * cost:
            self.rest_tokens = FIRST_REST_TOKENS
