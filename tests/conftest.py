"""Fixtures for tests of whole runs: one tiny model and one text, both read-only.

They also keep tests independent of the screen, the order of tests and the speed of the machine.
"""

from __future__ import annotations

import os
import random
import sys
from collections import Counter

import pytest
import torch
from families import WORDS, save_tiny
from hypothesis import HealthCheck, settings

for name in ("FORCE_COLOR", "GITHUB_ACTIONS", "PY_COLORS", "TERMINAL_WIDTH", "TTY_COMPATIBLE"):
    os.environ.pop(name, None)
os.environ["COLUMNS"] = "80"
SEEDS = int(os.environ.get("SEEDS", "1"))
no_clock = dict(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("grasp", **no_clock, derandomize=SEEDS == 1)
settings.load_profile("grasp")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A llama of 3 layers, each with 96 FFN channels and 4 KV groups."""
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """Some 6,000 tokens, one a byte."""
    draw = random.Random(0)
    file = tmp_path_factory.mktemp("text") / "words.txt"
    file.write_text(" ".join(draw.choice(WORDS) for _ in range(1200)))
    return file


@pytest.fixture
def call(capsys, monkeypatch):
    """call("plan", MODEL, ...) is (exit code, stdout, stderr) of that command line."""
    from grasp.cli import main as cli  # it reads the size of the screen

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["grasp", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.main()
        out, err = capsys.readouterr()
        return left.value.code or 0, out, err

    return call


@pytest.fixture
def refused(call, tmp_path, monkeypatch):
    """refused(*arguments) is the one line, said by a command that leaves nothing behind."""
    monkeypatch.chdir(tmp_path)

    def refused(*arguments, code=1):
        before = sorted(tmp_path.rglob("*"))
        found, out, err = call(*arguments)
        assert (found, out) == (code, "")
        assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
        assert sorted(tmp_path.rglob("*")) == before
        return err.removeprefix("error: ").rstrip("\n")

    return refused


def pytest_generate_tests(metafunc):
    """`SEEDS=50 pytest tests/kernels` runs every test there with 50 seeds."""
    if SEEDS > 1:
        metafunc.parametrize("fresh_start", range(SEEDS), indirect=True)


@pytest.fixture(autouse=True)
def fresh_start(request):
    """No random number and no compiled code of the tests before it."""
    torch.manual_seed(getattr(request, "param", 0))
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """More only get into each other's way on matrices this small."""
    torch.set_num_threads(1)


def pytest_terminal_summary(terminalreporter):
    """What each file took, the slowest first: the suite is to stay under eight minutes."""
    seconds = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if hasattr(report, "duration"):
                seconds[report.nodeid.partition("::")[0]] += report.duration
    terminalreporter.section("seconds by file")
    for file, took in seconds.most_common():
        terminalreporter.write_line(f"{took:7.1f} {file}")
