"""Time the contenders with pytest-benchmark: `pytest benchmarks/`, on CUDA or small on the CPU.

The contenders of an op are timed only if the op's correctness tests pass first.
"""

from functools import cache

import pytest
import torch

pytest.importorskip("pytest_benchmark")

from benchmarks.kernels import SETUPS, correct, passes, setups

SMALL = not torch.cuda.is_available()
passes_tests = cache(correct)


@pytest.mark.parametrize("op", SETUPS)
def test_contenders_run(op):
    """Every contender of every shape gives an output of the same shape."""
    for setup in setups(op, SMALL):
        shapes = {run(*setup.inputs).shape for run in setup.contenders.values()}
        assert len(shapes) == 1, (setup.label, shapes)


@pytest.mark.parametrize("which", ["forward", "both"])
@pytest.mark.parametrize("contender", ["grasp", "other"])
@pytest.mark.parametrize("op", SETUPS)
def test_time(op, contender, which, benchmark):
    """The largest shape at the smallest kept share: grasp against the first other contender."""
    if not passes_tests(op, SMALL):
        pytest.fail(f"the correctness tests of {op} fail: no figures")
    *_, setup = setups(op, SMALL)
    names = [n for n in setup.contenders if n.startswith("grasp") == (contender == "grasp")]
    calls = passes(setup, names[0])
    if which not in calls:
        pytest.skip(f"{op} has no {which} pass of its own")

    def run():
        calls[which]()
        if not SMALL:
            torch.cuda.synchronize()

    benchmark.group = f"{op} {which} {setup.label}"
    benchmark.extra_info["contender"] = names[0]
    benchmark(run)
