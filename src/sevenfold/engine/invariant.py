"""Runs each request's rows so that their bits do not depend on any other's."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sevenfold.engine.device import DeviceRunner
from sevenfold.engine.rows import Row
from sevenfold.engine.runner import Runner


class InvariantRunner:
    """A runner whose products have the shapes that a request alone gives them.

    A prompt runs alone, cut at multiples of chunk_tokens. Decode rows run in steps of one size,
    which a recorded step is padded to; where none is recorded, that size is one row.

    pads: whether steps are padded.
    """

    def __init__(self, runner: Runner | DeviceRunner, chunk_tokens: int) -> None:
        self._runner, self._chunk_tokens = runner, chunk_tokens
        self.pads = isinstance(runner, DeviceRunner) and runner.capture is not None

    def run(self, rows: Sequence[Row]) -> Tensor:
        """Run rows as Runner.run."""
        if self.pads and all(len(row.tokens) == 1 for row in rows):
            return self._runner.run(rows)
        return torch.cat([self._run_alone(row) for row in rows])

    def _run_alone(self, row: Row) -> Tensor:
        *parts, last = row.parts(self._chunk_tokens)
        for part in parts:
            self._runner.run([part])
        return self._runner.run([last]).clone()
