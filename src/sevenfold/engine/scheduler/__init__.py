"""Which request computes what next: plain Python over counts, without a tensor."""

from sevenfold.engine.scheduler.cache import Cache
from sevenfold.engine.scheduler.config import QueueFullError, SchedulerConfig
from sevenfold.engine.scheduler.scheduler import Scheduler
from sevenfold.engine.scheduler.step import DecodeRow, PrefillChunk, Step
from sevenfold.engine.scheduler.waiting import WaitReason

__all__ = [
    "Cache",
    "DecodeRow",
    "PrefillChunk",
    "QueueFullError",
    "Scheduler",
    "SchedulerConfig",
    "Step",
    "WaitReason",
]
