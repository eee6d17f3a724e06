"""The error of the command line. Nothing here imports torch."""

__all__ = ["CommandError"]


class CommandError(ValueError):
    """Option, network or file that a command cannot use. The message names it and the fix."""
