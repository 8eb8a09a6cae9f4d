"""The command line: each verb parses, calls its Python twin and prints; it decides nothing."""

from __future__ import annotations

import io
import os
import signal
import sys
from contextlib import redirect_stdout
from typing import Any

import typer

from grasp import distributed
from grasp.cli import checkpoint, measure, plan, prune  # noqa: F401  they add their verbs
from grasp.cli.app import app, as_options, verbs  # noqa: F401  typer documents `app`
from grasp.errors import GraspError

RESUMABLE = ("prune", "compare", "sparsify", "recover")
INTERRUPTED, TERMINATED = 130, 143  # 128 and the signal's number, as shells have it
RESUME = ": run the same command again to resume"
SPLIT = ("prune", "compare", "eval", "sparsify")  # the verbs that torchrun may start


class Terminated(BaseException):
    """SIGTERM, by which schedulers stop a job: nothing on the way takes it for a failure."""


def main() -> None:
    """Entry point: a user's mistake is one line on stderr and exit code 1, never a traceback."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # in ASCII, say; stderr replaces by itself
    signal.signal(signal.SIGTERM, _terminate)
    said, code = _run_as_rank() if distributed.launched() else _run()
    if said:
        print(said, file=sys.stderr)
    sys.exit(code)


def _run() -> tuple[str, int]:
    """Run the command line; return what is to be said on stderr, and the exit code."""
    try:
        code = verbs()(standalone_mode=False) or 0  # that of typer.Exit
    except GraspError as error:
        _settle()
        return f"error: {as_options(str(error))}", 1
    except (KeyboardInterrupt, typer.Abort):
        _settle()
        code = INTERRUPTED
    except Terminated:
        _settle()
        code = TERMINATED
    except Exception as error:
        _settle()
        if not hasattr(error, "format_message"):  # click's usage errors have it
            raise
        message = _usage(error)  # none where the help was printed instead
        return (f"error: {message}" if message else ""), 2
    _settle()
    if code in (INTERRUPTED, TERMINATED):  # newer releases of typer return the first
        stopped = "stopped" if code == INTERRUPTED else "stopped by SIGTERM"
        resumable = sys.argv[1:2] in [[verb] for verb in RESUMABLE]
        return stopped + RESUME * resumable, code
    return "", code


def _usage(error: Any) -> str:
    """What click says of a usage error, and the value, which newer releases of typer leave out."""
    message: str = error.format_message().replace("Value error, ", "")
    for found in getattr(error.__cause__, "errors", list)():  # of pydantic, which typer asks
        value = repr(found["input"])
        message += "" if value in message else f", got {value}"
    return message


def _settle() -> None:
    """Let no SIGTERM change what a rank is about to say: torchrun sends it once one has failed."""
    if distributed.launched():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _run_as_rank() -> tuple[str, int]:
    """`_run` in one of the processes of torchrun: the first prints, one says what stopped all."""
    try:
        distributed.join()
        if sys.argv[1:2] not in [[verb] for verb in SPLIT]:
            raise GraspError(f"torchrun is for {', '.join(SPLIT)}: start this without it")
        with (
            open(os.devnull, "w") as nowhere,
            redirect_stdout(sys.stdout if distributed.is_first() else nowhere),
        ):
            said, code = _run()
    except GraspError as error:
        _settle()
        said, code = f"error: {error}", 1
    except Terminated:
        return "", TERMINATED  # before it has met the others
    except Exception as error:
        _settle()
        if not distributed.is_cut_off(error):
            distributed.first_to_fail()
            raise
        said, code = "", TERMINATED
    if code in (INTERRUPTED, TERMINATED):
        missing = distributed.missing()
        if missing is None:  # another rank has failed, and told why
            return "", code
        if missing:
            numbers = ", ".join(map(str, missing))
            said = f"error: rank {numbers} was killed or lost" + RESUME
        return said * distributed.once("stopped"), code
    if code:
        said = said.replace("error:", f"error on rank {distributed.rank()}:", 1)
        return said * distributed.first_to_fail(), code
    distributed.leave()
    return said, code


def _terminate(number: int, frame: object) -> None:
    signal.signal(number, signal.SIG_IGN)  # a second one must not cut the clean-up short
    raise Terminated
