"""Dividing a step's tokens among open requests."""

from sevenfold.engine.request import Request
from sevenfold.engine.scheduler.cache import Cache
from sevenfold.engine.scheduler.config import SchedulerConfig
from sevenfold.engine.scheduler.roster import Entry, Roster
from sevenfold.engine.scheduler.step import DecodeRow, PrefillChunk
from sevenfold.engine.scheduler.tenancy import Tenancy


class Planner:
    """Divides a step's tokens.

    Each decode row gets one token and each open prompt min_chunk_tokens: the limits leave room for
    both. Of what is left, drafts take what they ask for, and then prompts in the order of rank.
    Where nothing decodes, the first prompt may take more, which leaves the others what they must
    have.
    """

    def __init__(
        self, cache: Cache, config: SchedulerConfig, roster: Roster, tenancy: Tenancy
    ) -> None:
        self._cache, self._config = cache, config
        self._roster, self._tenancy = roster, tenancy

    def run(self) -> tuple[tuple[PrefillChunk, ...], tuple[DecodeRow, ...]]:
        """Return the chunks and the decode rows of this step."""
        least = self._config.min_chunk_tokens
        prompts = list(self._roster.prefilling)
        owed = [min(entry.num_uncomputed_tokens, least) for entry in prompts]
        spare = self._config.max_step_tokens - len(self._roster.decoding) - sum(owed)
        decodes, spare = self._decode_rows(spare)
        lone = 0 if decodes else self._config.lone_chunk_tokens or 0
        chunks = []
        for entry, tokens in zip(prompts, owed, strict=True):
            chunk = self._chunk(entry, max(tokens + spare, lone))
            spare, lone = max(0, spare - max(0, chunk.end - chunk.first - tokens)), 0
            chunks.append(chunk)
        return tuple(chunks), decodes

    def _decode_rows(self, spare: int) -> tuple[tuple[DecodeRow, ...], int]:
        """Return the rows and the tokens that their drafts leave over."""
        rows = []
        for entry in self._roster.decoding:
            drafts = 0
            if entry.request.draft_tokens:
                drafts = self._drafts(entry, spare)
                spare -= drafts
            rows.append(DecodeRow(entry.request, drafts, self._snapshots(entry.request, drafts)))
        return tuple(rows), spare

    def _drafts(self, entry: Entry, spare: int) -> int:
        """Return how many drafts are wanted and have a place; they never cost another its own."""
        request = entry.request
        drafts = min(request.draft_tokens, request.num_remaining_tokens - 1, spare)
        certain = request.num_computed_tokens + 1
        if self._tenancy.reserve(entry, certain + drafts):
            return drafts
        return entry.reserved_tokens - certain

    def _snapshots(self, request: Request, drafts: int) -> tuple[int, ...]:
        first, page = request.num_computed_tokens, self._config.page_tokens
        end = first + 1 + drafts
        if first // page == end // page:  # a snapshot lies on a page's border
            return ()
        return tuple(self._cache.snapshots_due(request, first, end))

    def _chunk(self, entry: Entry, most: int) -> PrefillChunk:
        request = entry.request
        first, total = request.num_computed_tokens, request.num_tokens
        end = min(total, first + most)
        if end < total:
            end -= end % self._config.grain_tokens
        due = self._cache.snapshots_due(request, first, end)
        return PrefillChunk(request, first, end, tuple(due), yields_token=end == total)
