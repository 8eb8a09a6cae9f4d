"""The command line: each verb parses, calls its Python twin and prints; it decides nothing."""

from __future__ import annotations

import io
import signal
import sys

import typer

from grasp.cli import checkpoint, measure, plan, prune  # noqa: F401  they add their verbs to `app`
from grasp.cli.app import app, as_options
from grasp.errors import GraspError

RESUMABLE = ("prune", "compare", "sparsify", "recover")
INTERRUPTED, TERMINATED = 130, 143  # 128 and the signal's number, as shells have it


class Terminated(BaseException):
    """SIGTERM, by which schedulers stop a job: nothing on the way takes it for a failure."""


def main() -> None:
    """Entry point: a user's mistake is one line on stderr and exit code 1, never a traceback."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # in ASCII, say; stderr replaces by itself
    signal.signal(signal.SIGTERM, _terminate)
    code = None
    try:
        code = app(standalone_mode=False)  # that of typer.Exit, or None
    except GraspError as error:
        _fail(f"error: {as_options(str(error))}", 1)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except Terminated:
        code = TERMINATED
    except Exception as error:
        if not hasattr(error, "format_message"):  # click's usage errors have it
            raise
        message = error.format_message()  # none where the help was printed instead
        _fail(f"error: {message}" if message else "", 2)
    if code in (INTERRUPTED, TERMINATED):  # newer releases of typer return the first
        stopped = "stopped" if code == INTERRUPTED else "stopped by SIGTERM"
        resumable = sys.argv[1:2] in [[verb] for verb in RESUMABLE]
        _fail(stopped + ": run the same command again to resume" * resumable, code)
    sys.exit(code)


def _terminate(number: int, frame: object) -> None:
    signal.signal(number, signal.SIG_IGN)  # a second one must not cut the clean-up short
    raise Terminated


def _fail(message: str, code: int) -> None:
    if message:
        print(message, file=sys.stderr)
    sys.exit(code)
