"""Ranks for the tests: forks of a server that has imported everything.

They have the environment, the store and the SIGTERM of torchrun.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import sys
import threading
import time

import torch
import torch.distributed as dist

from grasp.cli import main as cli
from grasp.run import folder as run

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["grasp.cli.main", "grasp.run.prune", "torch.distributed"])


def command(verb, model, out, **options):
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    return [verb, str(model), f"--out={out}", *flags]


def _rank(number, count, local, port, arguments, output, killed_after):
    told = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(told, sys.stdout.fileno())
    os.dup2(told, sys.stderr.fileno())
    os.environ |= {"TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(number), "WORLD_SIZE": str(count)}
    os.environ |= {"LOCAL_RANK": str(number % local), "LOCAL_WORLD_SIZE": str(local)}
    torch.set_num_threads(1)
    run.SAVE_EVERY = 0.0
    if isinstance(killed_after, float):
        threading.Timer(killed_after, os.kill, (os.getpid(), signal.SIGKILL)).start()
    elif killed_after is not None:
        gather, calls = dist.all_gather, itertools.count(1)

        def gather_or_die(*args):
            if next(calls) == killed_after:
                os.kill(os.getpid(), signal.SIGKILL)
            return gather(*args)

        dist.all_gather = gather_or_die
    sys.argv = ["grasp", *arguments]
    cli.main()


def ranks(count, arguments, output=os.devnull, killed=None, local=None):
    """Exit codes of `grasp ARGUMENTS` on `count` ranks, `local` (default: all) to a machine.

    `killed` is (rank, after so many items, or seconds if it is a float).
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    started = []
    for number in range(count):
        after = killed[1] if killed and killed[0] == number else None
        args = (number, count, local or count, store.port, arguments, str(output), after)
        started.append(processes.Process(target=_rank, args=args))
        started[-1].start()
    while not any(process.exitcode for process in started):
        if not any(process.is_alive() for process in started):
            return [0] * count
        time.sleep(0.05)
    for process in started:  # as torchrun does
        process.terminate()
    for process in started:
        process.join(30)
        process.kill()
        process.join()
    return [process.exitcode for process in started]
