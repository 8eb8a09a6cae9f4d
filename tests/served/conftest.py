"""Tests of pruned models in a real vLLM: `make test-vllm` makes its environment and runs them."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("vllm") else ["test_*.py"]
