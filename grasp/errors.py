"""The one exception that reaches a user as a single line."""


class GraspError(Exception):
    """A user's mistake or a machine's limit: names the value, what was expected, and the fix."""
