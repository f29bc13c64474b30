# Two commands: `make demo` and `make test`. Each sets up what it needs in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-slow fuzz lint bench bench-large bench-coverage clean

demo: $(VENV)/.demo
	mkdir -p demo-output
	cd demo-output && ../$(BIN)/hessdiag demo --force && ../$(BIN)/hessdiag analyze model.pt --force

test: $(VENV)/.test lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 2

test-slow: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -n 2

ROUNDS ?= 200
fuzz: $(VENV)/.test
	HESSDIAG_FUZZ=$(ROUNDS) OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/fuzz -n 2 -q

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.test
	OMP_NUM_THREADS=2 $(BIN)/python tests/bench/side_by_side.py
	$(BIN)/python tests/bench/structured.py
	$(BIN)/python tests/bench/growth.py
	$(BIN)/python tests/bench/size.py

bench-large: $(VENV)/.test
	$(BIN)/python tests/bench/large.py

bench-coverage: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python tests/bench/coverage.py
	OMP_NUM_THREADS=1 $(BIN)/python tests/bench/coverage.py 250 density

$(VENV)/.demo: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	touch $@

$(VENV)/.test: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[test,dev]"
	touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) dist build demo-output
