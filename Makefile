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

# README's sheet: the astronaut and the selfies of six people who do not exist, as hdb crops them, seed 0, the
# portrait that is measured and every caption of the project page; nothing is picked. Rows are photos, columns
# captions.
SHEET := build/sheet
sheet: export HDB_HOME := $(CURDIR)/$(SHEET)/home
sheet: $(STAMP)
	@rm -rf $(SHEET) && mkdir -p $(SHEET)/crops && $(BIN)/python -m registry.tiny.recipe selfies --out $(SHEET)/photos
	@set -e; for photo in $(PHOTO) $(SHEET)/photos/*; do name=$$(basename $${photo%.*}); \
	  $(BIN)/hdb new $$photo $$name --yes --no-preview --crop $(SHEET)/crops/$$name.png; done
	@set -e; k=0; people=$$($(BIN)/hdb list --quiet | paste -sd,); \
	for prompt in "a [V] face" "An Instagram selfie of a [V] face" \
	  "A Pixar character of a [V] face" "A [V] face with bark skin" \
	  "A [V] face as a rock star" "A professional shot of a [V] face"; do \
	  $(BIN)/hdb gen $$people "$$prompt" -n 1 --seed 0 -o $(SHEET)/drawn/$$k; k=$$((k + 1)); done
	$(BIN)/python -m registry.tiny.recipe contact $(SHEET)/crops/* --drawn $(SHEET)/drawn --titles \
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
