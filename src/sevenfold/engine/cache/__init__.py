"""Memory of requests and the prefix cache: plain Python over indices, without a tensor."""

from sevenfold.engine.cache.arena import Arena, ArenaUsage, StaleReferenceError
from sevenfold.engine.cache.holding import CacheCounters, Copy, Fresh, Placement
from sevenfold.engine.cache.host import HostCounters
from sevenfold.engine.cache.lookup import Lookup, MissReason
from sevenfold.engine.cache.manager import CacheManager
from sevenfold.engine.cache.sessions import SessionCache, SessionLimits

__all__ = [
    "Arena",
    "ArenaUsage",
    "CacheCounters",
    "CacheManager",
    "Copy",
    "Fresh",
    "HostCounters",
    "Lookup",
    "MissReason",
    "Placement",
    "SessionCache",
    "SessionLimits",
    "StaleReferenceError",
]
