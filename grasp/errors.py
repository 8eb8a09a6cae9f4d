"""The one exception that reaches a user as a single line, and what goes into that line."""

from textwrap import shorten

REASON = 1000  # characters: some list every model that they know
NEW_START = "other options need a new start: remove the .run folder"
DISTRIBUTION = "graspprune"  # what pip calls this; `grasp` is somebody else's


class GraspError(Exception):
    """A user's mistake or a machine's limit: names the value, what was expected, and the fix."""


def reason(error: BaseException) -> str:
    """All that an exception of another library says, on one line, or else its name."""
    return shorten(str(error), REASON, placeholder=" ...") or type(error).__name__


def install(extra: str) -> str:
    """The command that installs what one of our extras needs."""
    return f"pip install '{DISTRIBUTION}[{extra}]'"
