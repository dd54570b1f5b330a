# Two commands matter: `make serve` and `make test`. Both make the same environment first; the second run installs nothing.
.PHONY: serve test e2e check format demo-model clean
.DEFAULT_GOAL := serve

VENV ?= .venv
PYTHON ?= $(shell for p in python3 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo $$p && break; done)
BIN := $(VENV)/bin

$(VENV)/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Punchline needs Python 3.11 or 3.12; name it with: make PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

serve: $(VENV)/.installed  ## serve the demo model, or whatever PUNCHLINE_MODEL names, on 127.0.0.1:8000
	@exec $(BIN)/punchline serve $(ARGS)

# These start servers and clients of their own, which want the machine for themselves; all others share its cores.
ALONE := tests/load tests/e2e tests/wire

test: check  ## format, lint, types, tests
ifdef ARGS
	$(BIN)/python -m pytest $(ARGS)
else
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal $(ALONE:%=--ignore=%)
	$(BIN)/python -m pytest $(ALONE)
endif

# Out of Debian's package, which is not installed: it would start a server.
PROMTOOL = { cd $(VENV) && apt-get update -qq && apt-get download -qq prometheus && dpkg --fsys-tarfile prometheus_*.deb | \
	tar --extract --strip-components=3 --directory=bin ./usr/bin/promtool && rm prometheus_*.deb; }

e2e: $(VENV)/.installed  ## what the tests marked e2e want; `make test` skips them without it
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[e2e]'
	@command -v chromium || { apt-get update -qq && apt-get install -qq --no-install-recommends chromium; } || echo "no Chromium: the page is not tested"
	@command -v promtool || test -x $(BIN)/promtool || $(PROMTOOL) || echo "no promtool: Prometheus' own verdict on the rules is not asked"

check: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.installed  ## put the code into its one form
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

demo-model: $(VENV)/.installed  ## draw, teach and train the bundled demo model again
	$(BIN)/python -m training.demo --out app/demo

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
