"""A rank that follows, as a program: python -m sevenfold.engine.tensor_parallel JOINING."""

import sys

from sevenfold.engine.heap import freeze_heap
from sevenfold.engine.tensor_parallel.follower import follow
from sevenfold.engine.tensor_parallel.joining import Joining, Part, join
from sevenfold.engine.worker import Worker


def main() -> None:
    """Load this rank's part of the model, take the first rank's plan, and follow."""
    joined = join(Joining.model_validate_json(sys.argv[1]))
    part = Part.model_validate_json(joined.channel.receive_text())
    worker = Worker(joined.model, part.plan(joined.model), part.worker)
    freeze_heap()  # a rank that collects garbage holds up all of them
    follow(worker, joined.channel)
    joined.leave(worker)


if __name__ == "__main__":
    main()
