"""The errors that Sevenfold raises on purpose.

    SevenfoldError
    ├── ConfigError       also a ValueError: a configuration breaks a rule
    ├── CheckpointError   also a ValueError: a checkpoint cannot be read or written
    ├── DataError         also a ValueError: training data cannot be read or written
    ├── TrainingError     also a RuntimeError: a run cannot go on
    └── UnsupportedError  also a NotImplementedError: a legal request that this path cannot serve

A caller's wrong argument is a plain ValueError or TypeError.
"""


class SevenfoldError(Exception):
    """Base of every error that Sevenfold raises on purpose."""


class ConfigError(SevenfoldError, ValueError):
    """A configuration breaks a rule; the message names file, key, rule and value."""


class CheckpointError(SevenfoldError, ValueError):
    """A checkpoint cannot be read or written; the message names file, tensor or key, and remedy."""


class DataError(SevenfoldError, ValueError):
    """Training data cannot be read or written; the message names file and remedy."""


class TrainingError(SevenfoldError, RuntimeError):
    """A training run cannot go on; what it had saved stays."""


class UnsupportedError(SevenfoldError, NotImplementedError):
    """A legal request that the chosen implementation, device or format cannot serve."""
