# `make demo` and `make test` do all set-up themselves, in the active virtual environment or .venv;
# `make gpu` takes the Python that is there.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.PHONY: demo test oldest lint typecheck install audit clean gpu gpu-dry-run gpu-sanitize

# Installed only where `import torch` fails; an installed torch, CPU or CUDA, is never replaced.
TORCH_VERSION := 2.13.0

PYTHON ?= python3
VENV := $(or $(VIRTUAL_ENV),$(CURDIR)/.venv)
STAMP := $(VENV)/.msf-installed
export PATH := $(VENV)/bin:$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

demo: install
	@train="msf train --preset digits --data digits --out runs/digits --resume --stage"
	$$train base & base=$$!
	trap 'kill $$base 2>/dev/null || true' EXIT
	$$train residual
	wait $$base
	settings="--solver heun --guidance-scale 1.1 1"
	msf sample runs/digits $$settings --num-images 100 --out runs/digits/samples.png --overwrite
	msf evaluate runs/digits $$settings --steps 16 4 --steps 16 16 \
	  --out runs/digits/evaluation.json --overwrite

test: install
	python -m pytest -n auto --dist loadgroup $(PYTEST_ARGS)

# The tests with every package at its lower bound in pyproject.toml, torch's own Triton among them, in
# an environment of its own (5 GB). PYTHON=python3.10 is the oldest Python.
OLDEST := build/oldest

oldest: $(OLDEST)/installed
	$(OLDEST)/bin/python -m pytest -n auto --dist loadgroup $(PYTEST_ARGS)

$(OLDEST)/installed: pyproject.toml CMakeLists.txt $(shell find csrc -type f)
	rm -rf $(OLDEST)
	$(PYTHON) -m venv $(OLDEST)
	grep -o '"[a-z][a-z0-9-]*>=[0-9.]*' pyproject.toml | tr -d '"' | sed 's/>=/==/' > $(OLDEST)/bounds.txt
	pip="$(OLDEST)/bin/python -m pip install -q -c $(OLDEST)/bounds.txt"
	sed -n 's/^requires = \[\(.*\)\]/\1/p' pyproject.toml | tr -d , | xargs $$pip setuptools
	MSF_CUDA=OFF $$pip --no-build-isolation -e '.[test,dev]'
	touch $@

lint: install
	ruff check .
	ruff format --check .
	find csrc tests -regex '.*\.\(cpp\|cuh?\|hpp\)' | xargs clang-format --dry-run --Werror

typecheck: install
	python -m mypy

install: $(STAMP)

# The stamp names the checkout it installed: an environment shared by two serves the latest caller.
ifneq ($(file <$(STAMP)),$(CURDIR))
.PHONY: $(STAMP)
endif

# pip goes to the network only for what is missing, so this works offline once all is installed;
# hence also no build isolation, which would download the build requirements each time.
$(STAMP): Makefile pyproject.toml CMakeLists.txt $(shell find csrc -type f)
	@python=$$([ -x $(VENV)/bin/python ] && echo $(VENV)/bin/python || echo $(PYTHON))
	name=$$($$python -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
	missing=()
	command -v $${CXX:-g++} >/dev/null || missing+=(g++)
	$$python -c 'import sysconfig; open(sysconfig.get_path("include") + "/Python.h")' \
	  2>/dev/null || missing+=($$name-dev)
	$$python -c 'import ensurepip, venv' 2>/dev/null || missing+=($$name-venv)
	if [ $${#missing[@]} -gt 0 ]; then
	  echo "set-up: installing system packages with apt-get: $${missing[*]}"
	  command -v apt-get >/dev/null || { echo "set-up: no apt-get here; please install them" >&2; exit 1; }
	  sudo=$$([ $$(id -u) = 0 ] || echo sudo)
	  $$sudo apt-get update
	  $$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $${missing[@]}
	fi
	if [ ! -x $(VENV)/bin/python ]; then
	  site=$$($(PYTHON) -c 'import torch' 2>/dev/null && echo --system-site-packages || true)
	  echo "set-up: creating $(VENV) $$site"
	  $(PYTHON) -m venv $$site $(VENV)
	fi
	python -m pip --version >/dev/null 2>&1 || python -m ensurepip
	python -c 'import torch' 2>/dev/null || {
	  echo "set-up: no torch here; installing torch $(TORCH_VERSION)"
	  python -m pip install torch==$(TORCH_VERSION)
	}
	python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' \
	  > $(VENV)/msf-constraints.txt
	cmake=$$(command -v cmake >/dev/null || echo cmake)
	sed -n 's/^requires = \[\(.*\)\]/\1/p' pyproject.toml | tr -d , | xargs python -m pip install $$cmake
	python -m pip install --no-build-isolation -c $(VENV)/msf-constraints.txt -e '.[test,dev]'
	echo $(CURDIR) > $(STAMP)

# Which Triton compiles a kernel decides whether it is right and spills. The audit takes the one that
# is installed and, for Hopper, where ptxas has got products wrong, 3.6, which is torch 2.11's.
TRITON_3_6 := build/triton-3.6.0

audit: install $(TRITON_3_6)
	python -m msf_kernels.audit
	PYTHONPATH=$(TRITON_3_6) python -m msf_kernels.audit --backend triton --architecture 90

$(TRITON_3_6): | install
	rm -rf $@.part
	python -m pip install --quiet --no-deps --target $@.part triton==3.6.0
	mv $@.part $@

# On a machine with a GPU, in its own Python and without network: builds for that GPU, tests, trains
# and benchmarks, and stops after eight minutes, with all logs and results in build/gpu.
gpu:
	@$(PYTHON) -m benchmarks.gpu --minutes 8

# The same steps on a CPU: nothing is compiled, and all is tiny.
gpu-dry-run: install
	@python -m benchmarks.gpu --dry-run

# After `make gpu`. Without PyTorch's cache every tensor is an allocation of its own, with bounds to
# check.
gpu-sanitize:
	for tool in memcheck racecheck; do
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 9 \
	    $(PYTHON) -m pytest -q tests/kernels \
	    -k 'cuda and (bitwise or strided or bit_for_bit or channels_last or test_merge)'
	done

clean:
	rm -rf .venv build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
