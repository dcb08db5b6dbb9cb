# One command per job; CI runs the same ones. Nothing is written outside the checkout but the model cache.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install demo test soak chaos check format stubs bench clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@echo "==> creating the environment in $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@echo "==> installing SplitServe and what it needs (torch, UCX, Redis; a few minutes the first time)"
	@$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,ucx-cu12,redis-server]'
	@echo "==> compiling the CPU kernels (without a compiler the torch reference is used)"
	@$(BIN)/python -m kernels.cpu.build || true
	@touch $@
	@echo "==> installed"

demo: install
	@$(BIN)/python examples/demo.py

# Two at a time, but for scenarios of whole clusters, which fill the machine. All run, whatever failed before.
test: install
	@failed=0; \
	$(BIN)/python -m pytest -n 2 --dist loadfile --ignore tests/e2e --ignore tests/chaos || failed=1; \
	$(BIN)/python -m pytest tests/e2e tests/chaos || failed=1; \
	exit $$failed

soak: install
	@SPLITSERVE_SOAK_SECONDS=$${SPLITSERVE_SOAK_SECONDS:-600} $(BIN)/python -m pytest -s tests/e2e/test_soak.py

chaos: install
	@SPLITSERVE_CHAOS_SECONDS=$${SPLITSERVE_CHAOS_SECONDS:-1800} $(BIN)/python -m pytest -s tests/chaos

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python proto/generate.py --check

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

stubs: install
	$(BIN)/python proto/generate.py

bench: install
	$(BIN)/python -m bench.compare --peers bench/peers.example.toml --only SplitServe --rounds 1 --out build/bench \
	  --workloads single prefill closed-8 poisson-1

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
