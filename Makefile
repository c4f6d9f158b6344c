# Everything runs in .venv, which is made from the hashed lock and remade when the lock changes.
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do \
  $$p -c 'import venv' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
SHELL := /bin/bash

# A relative THESIS_DATA or KERAS_HOME counts from here; JOBS is how many notebooks run at once.
PROFILE ?= demo
TEST := THESIS_DERIVED=runs/test/derived $(BIN)/python -m pytest --nbval
RUN := PYTHONPATH=.:notebooks $(BIN)/python -m support.run $(if $(JOBS),--jobs $(JOBS))

.DEFAULT_GOAL := help
.PHONY: help data reproduce real thesis test rehearsal lab refresh readme site lock lint backbone benchmark \
  scaling crosscheck peers oldest gpu clean-cache

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/	/' | expand -t 12

.venv/ready: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v in ((3, 11), (3, 12)) else \
	  "Python 3.11 or 3.12 is needed, found %d.%d: make PYTHON=/path/to/python3.11" % v)'
	rm -rf .venv
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-index --no-build-isolation -e .
	@touch $@

data: .venv/ready  ## fetch the public data sets (says which, from where); ONLY="mnist vehicles"
	PYTHONPATH=.:notebooks $(BIN)/python -m support.fetch $(ONLY)

reproduce: .venv/ready  ## run every notebook (profile demo: offline, CPU) into runs/demo/
	$(RUN) --profile demo $(NOTEBOOKS)

real: .venv/ready  ## the same on real data: what `make data` fetched, or your own (THESIS_DATA, KERAS_HOME)
	$(RUN) --profile real $(NOTEBOOKS)

thesis: .venv/ready  ## the thesis's own data: your ILSVRC2012 copy, InceptionV3
	$(RUN) --profile thesis $(NOTEBOOKS)

test: .venv/ready  ## unit tests, and every notebook against its stored outputs, side by side
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	rm -rf runs/test
	$(TEST) -n 0 notebooks/0[012]_*.ipynb
	$(TEST) -n $(or $(JOBS),logical) notebooks/0[3-9]_*.ipynb notebooks/1[0-5]_*.ipynb tests
	$(TEST) -n 0 notebooks/16_*.ipynb

rehearsal: .venv/ready  ## do all notebooks run on six tars, and on two folders of one's own? (an hour, drawn pictures)
	$(BIN)/python -m pytest -m rehearsal tests/test_rehearsal.py

lab: .venv/ready  ## open JupyterLab
	$(BIN)/jupyter lab notebooks

refresh: .venv/ready  ## run demo notebooks and copy the run to what is committed; PROFILE=real: only copy
	$(RUN) --profile $(PROFILE) --promote $(NOTEBOOKS)

readme: .venv/ready  ## write the README's table and the verdict pages from the verdicts
	PYTHONPATH=.:notebooks $(BIN)/python -m support.pages

site: .venv/ready  ## notebooks, figures and the API of `helpers` as a static site in runs/site/
	CUDA_VISIBLE_DEVICES=-1 $(BIN)/sphinx-build -q -W --keep-going -c docs . runs/site
	@echo "open runs/site/index.html"

backbone: .venv/ready  ## train the demo's feature network again
	PYTHONPATH=.:notebooks $(BIN)/python -m support.backbone

# Peers run on PyTorch and pin old packages, so they live in an environment of their own.
.peers-venv/ready: tests/benchmark/peers.txt
	rm -rf .peers-venv
	$(PYTHON) -m venv .peers-venv
	.peers-venv/bin/pip install --quiet --disable-pip-version-check -r $<
	@touch $@

benchmark: .venv/ready  ## cost and error of our influence beside NumPy and the naive way (half an hour)
	$(BIN)/python tests/benchmark/run.py $(if $(wildcard .peers-venv/ready),--peers .peers-venv/bin/python)

scaling: .venv/ready  ## seconds and memory against n, to a million rows on disk (8 GB, a quarter of an hour)
	$(BIN)/python tests/benchmark/scaling.py

gpu: .venv/ready  ## the benchmark's tasks and Inception-v3's products on the GPU that TensorFlow sees
	$(BIN)/python tests/benchmark/gpu.py

crosscheck: .venv/ready .peers-venv/ready  ## our influence and EK-FAC beside dattri's and kronfluence's
	PYTHONPATH=. $(BIN)/python tests/benchmark/crosscheck.py --peers .peers-venv/bin/python

peers: .peers-venv/ready  ## install dattri, pyDVL, captum and kronfluence for `make benchmark`

.oldest-venv/ready: tests/oldest.txt requirements.in
	rm -rf .oldest-venv
	$(PYTHON) -m venv .oldest-venv
	.oldest-venv/bin/pip install --quiet --disable-pip-version-check -r tests/oldest.txt -r requirements.in
	@touch $@

# Tests of `helpers` alone: the notebooks are promised for the lock only.
HELPERS := keras_facts checks silent objective any_model solvers hessian influence removals conformance \
  data_forms ekfac streaming validate
oldest: .oldest-venv/ready  ## tests of `helpers` on the oldest TensorFlow and Keras it is promised for (ten minutes)
	.oldest-venv/bin/python -m pytest -n $(or $(JOBS),logical) $(HELPERS:%=tests/test_%.py)

clean-cache:  ## delete data/derived: drawn pictures, features, everything that is kept on disk
	rm -rf data/derived

lint: .venv/ready  ## format and lint, notebooks too
	$(BIN)/ruff format . && $(BIN)/ruff check --fix .

lock:  ## resolve requirements.in anew into requirements.lock (hashes, no addresses)
	test -x .lock-venv/bin/uv || ($(PYTHON) -m venv .lock-venv && .lock-venv/bin/pip install --quiet uv)
	.lock-venv/bin/uv pip compile requirements.in --universal --fork-strategy fewest \
	  --python-version 3.11 --generate-hashes --no-emit-index-url --no-emit-find-links \
	  --no-header --quiet --output-file requirements.lock
