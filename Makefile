# make demo     a small language model goes through SFT, reward model and PPO (SEED=n: another world)
# make test     the whole test suite (ARGS='-k gae': options for pytest)
# make bench    the CPU kernels against PyTorch
# make lint     ruff, mypy, clang-format
# make venv     only what the others begin with: .venv and the kernels; make clean removes everything
#
# .venv is made on first use from VENV_PYTHON (python3), with pinned packages and a CPU-only torch.
# Another torch (a pip requirement, options may follow):
#                                make demo TORCH='torch==2.11.0'
# An existing environment, used as it is. Nothing is installed; tests skip what it lacks:
#                                PYTHON=/that/python make test
VENV_PYTHON ?= python3

ifdef PYTHON
  RUN := $(PYTHON)
else
  RUN := .venv/bin/python
  # Which torch is installed is part of the name, so that asking for another one installs it.
  STAMP := .venv/.installed-$(shell echo '$(TORCH)' | cksum | cut -d ' ' -f 1)
  COMMAND := .venv/bin/rlhf-train
endif
# A process a core, one thread each: tests this small lose by threads (those of threads set their own).
PARALLEL = $(shell $(RUN) -c 'import xdist' 2>/dev/null && \
             echo --numprocesses=auto --maxprocesses=8 --dist=worksteal -p no:benchmark)
export PYTHONPATH := $(CURDIR):$(CURDIR)/python$(if $(PYTHONPATH),:$(PYTHONPATH))

.PHONY: demo test bench lint venv build clean

demo: build
	$(RUN) -m rlhf_trainer demo $(if $(SEED),--seed $(SEED)) $(ARGS)

test: build
	$(if $(PARALLEL),OMP_NUM_THREADS=1) $(RUN) -m pytest $(PARALLEL) $(ARGS)

bench: build
	$(RUN) -m pytest benchmarks $(ARGS)

lint: $(STAMP)
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m mypy
	$(RUN) -c 'import clang_format; clang_format.clang_format()' --dry-run --Werror \
	  $(wildcard csrc/*.* csrc/*/*.*)

venv: build

build: $(COMMAND)
	$(RUN) setup.py --quiet build_ext --inplace

clean:
	rm -rf .venv build dist demo_out *.egg-info rlhf_kernels/*.so rlhf_kernels/*.dylib
	rm -rf .pytest_cache .ruff_cache .mypy_cache .benchmarks .bench

.venv/.installed-%: requirements/venv.txt tools/install_torch.py
	$(VENV_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python >= 3.10 is needed")'
	$(VENV_PYTHON) -m venv .venv
	rm -f .venv/.installed-*
	$(RUN) -m pip install --quiet pip==26.3
	$(RUN) tools/install_torch.py '$(TORCH)'
	$(RUN) -m pip install --quiet --no-deps -r requirements/venv.txt
	touch $@

$(COMMAND): $(STAMP) pyproject.toml
	$(RUN) setup.py --quiet build_ext --inplace
	PYTHONWARNINGS=ignore $(RUN) -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@
