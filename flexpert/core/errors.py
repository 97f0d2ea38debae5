"""The error types a caller of Flexpert may meet."""

from __future__ import annotations


class FlexpertError(Exception):
    """Base of every error that Flexpert raises on purpose."""


class ConfigError(FlexpertError, ValueError):
    """A configuration or constructor argument that cannot work; raised before any work is done."""


class InputError(FlexpertError, ValueError):
    """A tensor or argument of a call that does not fit the layer it was given to."""


class CheckpointError(FlexpertError, RuntimeError):
    """A checkpoint or data file that is damaged, foreign, or of another shape."""


class DistributedError(FlexpertError, RuntimeError):
    """A process group or mesh that cannot run what was asked."""
