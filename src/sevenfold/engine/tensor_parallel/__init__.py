"""Serving by several ranks, each with a part of every matrix: the first decides, all compute."""

from sevenfold.engine.tensor_parallel.channel import Channel
from sevenfold.engine.tensor_parallel.follower import follow
from sevenfold.engine.tensor_parallel.leader import LeadingWorker
from sevenfold.engine.tensor_parallel.ranks import Ranks, start_ranks

__all__ = ["Channel", "LeadingWorker", "Ranks", "follow", "start_ranks"]
