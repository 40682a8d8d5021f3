# The commands of the house. `make` alone lists them.
PYTHON ?= python

.PHONY: help setup setup-lowest setup-newest test slow lint docs site dist bench

help:
	@echo "make setup   install the package with all that tests need"
	@echo "make setup-lowest, make setup-newest   the same with the lowest or newest versions allowed"
	@echo "make test    tests and doctests, without the slow ones"
	@echo "make slow    the slow tests"
	@echo "make lint    ruff, its formatter, mypy"
	@echo "make docs    every code block of the documentation, and the notebooks"
	@echo "make dist    wheel and source distribution, checked (needs the extra release)"
	@echo "make site    the documentation as a site, in build/site (needs the extra docs)"
	@echo "make bench   one benchmark, quickly; prints the commands of the others"

setup:
	$(PYTHON) -m pip install -e ".[test]"

setup-lowest:
	mkdir -p build
	$(PYTHON) .ci/lowest.py >build/lowest.txt
	$(PYTHON) -m pip install -e ".[test]" -c build/lowest.txt

setup-newest:
	$(PYTHON) -m pip install --upgrade --upgrade-strategy eager -e ".[test]"

test:
	$(PYTHON) -m pytest -q

slow:
	$(PYTHON) -m pytest -q -m slow tests

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

docs:
	$(PYTHON) -m pytest -q -m "slow or not slow" tests/project/test_readme.py tests/project/test_docs.py
	$(PYTHON) .ci/notebooks.py

dist:
	rm -rf dist
	$(PYTHON) -m build
	$(PYTHON) -m twine check --strict dist/*
	$(PYTHON) .ci/distributions.py dist

site:
	$(PYTHON) -m sphinx -q -W --keep-going -E -b html -c docs . build/site
	$(PYTHON) .ci/site_links.py build/site

bench:
	mkdir -p build
	$(PYTHON) -m benchmarks.speed --quick --out build
	@echo "Written to build/. The committed results come from these, which take longer:"
	@echo "  $(PYTHON) -m benchmarks.speed    (the extra bench has the other libraries)"
	@echo "  $(PYTHON) -m benchmarks.memory"
	@echo "  $(PYTHON) -m benchmarks.scaling"
	@echo "  $(PYTHON) benchmarks/coupling_grid.py"
	@echo "  $(PYTHON) benchmarks/true_epsilons.py"
	@echo "  $(PYTHON) benchmarks/forgetting.py    (needs CERTUNLEARN_DATA_DIR, a folder with mnist/)"
	@echo "  $(PYTHON) benchmarks/coupling_mnist.py    (needs CERTUNLEARN_DATA_DIR, a folder with mnist/)"
	@echo "  $(PYTHON) -m benchmarks.deletion    (needs CERTUNLEARN_DATA_DIR, a folder with cifar10/)"
	@echo "  $(PYTHON) -m benchmarks.paper_figure    (needs CERTUNLEARN_DATA_DIR, a folder with both)"
	@echo "  certunlearn demo --out benchmarks/demo-digits"
	@echo "  certunlearn demo --dataset mnist --out benchmarks/demo-mnist"
	@echo "  certunlearn demo --dataset cifar10 --out benchmarks/demo-cifar10"
