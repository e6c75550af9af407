"""What one call may ask of the engine beside its tokens."""

import time
from typing import Annotated

from pydantic import BeforeValidator, Field

from sevenfold.config import StrictModel, as_tuple
from sevenfold.engine.request import Request

Priority = Annotated[int, Field(ge=-100, le=100)]


class RequestOptions(StrictModel):
    """What one call asks of the engine beside its tokens, by the names of the server's fields.

    priority: the greater, the sooner.
    deadline_s: seconds from the call after which an output is given up; None is never.
    cache_salt: outputs share cached prefixes only under one salt; None is a salt as well.
    session: a conversation, under the salt, that keeps what this prompt leaves in the prefix cache
        for its next turn, whatever others ask in between; None keeps nothing for it alone.
    marks: rising token counts of the prompt at which another prompt is likely to part from it, as
        at the end of a turn: the cache takes snapshots there.
    """

    priority: Priority = 0
    deadline_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    session: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    marks: Annotated[tuple[Annotated[int, Field(ge=1)], ...], BeforeValidator(as_tuple)] = ()

    def request(self, name: str, prompt: tuple[int, ...], max_tokens: int) -> Request:
        """Make a request that asks for them.

        Raises:
            ValueError: marks do not suit the prompt.
        """
        return Request(
            id=name,
            prompt=prompt,
            max_tokens=max_tokens,
            priority=self.priority,
            deadline_s=None if self.deadline_s is None else time.monotonic() + self.deadline_s,
            marks=self.marks,
            salt=(self.cache_salt or "").encode(),
            session=self.session,
        )
