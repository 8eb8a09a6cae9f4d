"""The one exception that reaches a user as a single line."""


class GraspError(Exception):
    """A user's mistake or a limit of the machine: names the value, what was expected, and the fix."""
