"""Why requests wait."""

from enum import Enum


class WaitReason(Enum):
    """What keeps the first waiting request from being opened, and so all behind it.

    TURN: nothing, it is looked at in the next step. MEMORY: its state and pages do not fit beside
    those of open requests. The others are limits of SchedulerConfig.
    """

    TURN = "turn"
    MEMORY = "memory"
    MAX_RUNNING = "max_running"
    MAX_PREFILLS = "max_prefills"
    MAX_STEP_TOKENS = "max_step_tokens"
