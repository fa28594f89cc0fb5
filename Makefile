# Two words cover a fresh clone, with no step before either: `make run` and `make test`.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
RUN    := build/run

PHOTO   := tests/data/astronaut.png
PROMPT  := a Pixar character of a [V] face
PICTURE := $(RUN)/astronaut-pixar.png

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: run test test-all check sheet gpu-check clean
.DELETE_ON_ERROR:

# One photo in, a picture out; the last line is the picture's path. The store lies in build/run, so that
# trying hdb never touches the identities of whoever tries it.
run: export HDB_HOME := $(CURDIR)/$(RUN)/home
run: $(STAMP)
	@mkdir -p $(RUN) && rm -f $(PICTURE)
	$(BIN)/hdb new $(PHOTO) astronaut --force --yes --no-preview
	$(BIN)/hdb gen astronaut "$(PROMPT)" --seed 0 --grid -o $(PICTURE)
	@test -s $(PICTURE) && echo $(PICTURE)

# README's sheet: the first six held-out people and the astronaut, seed 0, the portrait that is measured and
# every caption of the project page; nothing is picked. Rows are photos, columns captions.
HELD   := $(wildcard tests/data/heldout/90000[0-5]/photo-0.jpg)
PEOPLE := 900000,900001,900002,900003,900004,900005,astronaut
sheet: export HDB_HOME := $(CURDIR)/build/sheet/home
sheet: $(STAMP)
	@mkdir -p docs && rm -rf build/sheet
	@set -e; for photo in $(HELD); do \
	  $(BIN)/hdb new $$photo $$(basename $$(dirname $$photo)) --yes --no-preview; done
	$(BIN)/hdb new $(PHOTO) --yes --no-preview
	@set -e; k=0; for prompt in "a [V] face" "An Instagram selfie of a [V] face" \
	  "A Pixar character of a [V] face" "A [V] face with bark skin" \
	  "A [V] face as a rock star" "A professional shot of a [V] face"; do \
	  $(BIN)/hdb gen $(PEOPLE) "$$prompt" -n 1 --seed 0 -o build/sheet/$$k; k=$$((k + 1)); done
	$(BIN)/python -m registry.tiny.recipe contact $(HELD) $(PHOTO) --drawn build/sheet --titles \
	  photo portrait selfie "Pixar character" "bark skin" "rock star" "professional" --out docs/sheet.png

# Tests start a hundred processes, which would compile the package anew each time.
unexport PYTHONDONTWRITEBYTECODE

# Two processes of one thread each, on files of tests in turn: on two cores that takes half as long as one
# process of two threads, since the nets are small.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# Lint, types, tests: what CI runs, in minutes. The tests come last, so their summary does too.
test: check
	@$(PYTEST)

# The same and the tests marked `slow`: run it before a release.
test-all: check
	@$(PYTEST) -m "not gpu and not network"

check: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

# What no test without a GPU can see: the same numbers there as on the CPU, seconds and memory of every
# plan at Stable Diffusion 1.5's size. One table; it takes 3 GB of disk for a while.
gpu-check: $(STAMP)
	@$(BIN)/hdb bench device

# Keeps .venv, and the work of the recipe in build/, which can be hours of training.
clean:
	rm -rf $(RUN) dist .mypy_cache .pytest_cache .ruff_cache

# Installs once; again only after a change of what is installed. pip 25.1 is the first that knows --group.
$(STAMP): pyproject.toml constraints.txt
	@echo "Installing hdb and its tools into $(VENV). This happens once and can take minutes."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	@$(BIN)/python -m pip install --quiet -c constraints.txt -e . --group dev
	@touch $@
