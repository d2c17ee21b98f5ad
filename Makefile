# `make train`: everything from a bare clone to a trained model and a sample of its text.
# `make test`:  everything from a bare clone to a tested checkout.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

# `make train` on your own: RECIPE=yamls/gpt2-125m.yaml DATA=corpus.jsonl (a file, folder or glob to
# prepare, or a prepared folder or s3://bucket/prefix), PREPARE="--validation-fraction 0.1" (how to
# prepare it), ARGS="max_duration=100ba" (dotlist).
RECIPE ?= yamls/quickstart.yaml
DATA   ?=
PREPARE ?=
ARGS   ?=
WORKERS ?= 2

# `make chaos`: how often the run is killed, and what decides where, how, and what else goes wrong.
KILLS ?= 12
SEED  ?= $(shell date +%s)

.PHONY: help install train test chaos lint docs clean

help:
	@echo "make train   set up, then train a GPT-2 from streamed text and sample from it"
	@echo "             RECIPE=yamls/... DATA=my.jsonl ARGS='optimizer.adamw.lr=3.0e-4' for your own"
	@echo "             DATA=my.txt PREPARE=\"--split-on '\\\\n\\\\n' --validation-fraction 0.1\" for one text file"
	@echo "make test    set up, then run the linters and the whole test suite"
	@echo "make chaos   kill and restart a run, 12 times, in a world that fails (KILLS=3 SEED=1)"
	@echo "make docs    set up, then build the documentation into docs/_build/html"
	@echo "make clean   remove what the above made, except runs/"

# uv installs the environment in a minute where pip takes three; where it cannot, pip does. Bytecode
# is compiled once, for where PYTHONDONTWRITEBYTECODE is set each process would compile it again.
define install
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv \
	    && $(BIN)/uv pip install --quiet --compile-bytecode $(2) \
	        --python $(BIN)/python --editable ".[$(1)]" \
	    || $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[$(1)]"
	@touch $@
endef

$(VENV)/.installed: setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; assert (3, 10) <= sys.version_info < (3, 13), \
	    f"Python 3.10 to 3.12 is needed, this is {sys.version}; set PYTHON=python3.11"'
	@echo "Installing composer-gpt2 and what it needs into $(VENV) (6.5 GB, one to five minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(call install,s3-server)

# Pip installs what is excluded, too, which only makes the tests slower.
$(VENV)/.installed-test: $(VENV)/.installed tests/excludes.txt
	@echo "Installing what the tests need"
	$(call install,test,--excludes tests/excludes.txt)

$(VENV)/.installed-docs: $(VENV)/.installed-test
	$(call install,docs)

install: $(VENV)/.installed

train: $(VENV)/.installed
	@$(BIN)/composer-gpt2 quickstart --recipe "$(RECIPE)" $(if $(DATA),--data "$(DATA)") $(PREPARE) -- $(ARGS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/codespell
	$(BIN)/yamllint --strict yamls algorithms composer_gpt2

test: lint
	$(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder  # short files last

chaos: $(VENV)/.installed-test
	CHAOS_KILLS=$(KILLS) CHAOS_SEED=$(SEED) $(BIN)/pytest tests/chaos -s

docs: $(VENV)/.installed-docs
	$(BIN)/sphinx-build -W --keep-going -b html docs docs/_build/html
	@echo "Open docs/_build/html/index.html"

clean:
	rm -rf $(VENV) build dist *.egg-info docs/_build docs/reference .pytest_cache .ruff_cache .hypothesis
