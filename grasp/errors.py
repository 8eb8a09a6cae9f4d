"""The one exception that reaches a user as a single line, and what goes into that line."""

DISTRIBUTION = "graspprune"  # what pip calls this; `grasp` is somebody else's


class GraspError(Exception):
    """A user's mistake or a machine's limit: names the value, what was expected, and the fix."""


def reason(error: BaseException) -> str:
    """The first line of what an exception of another library says, or else its name."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def install(extra: str) -> str:
    """The command that installs what one of our extras needs."""
    return f"pip install '{DISTRIBUTION}[{extra}]'"
