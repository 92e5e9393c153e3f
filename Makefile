# make demo     a small language model goes through SFT, reward model and PPO (SEED=n: another world)
# make test     the whole test suite (ARGS='-k gae': options for pytest)
# make bench    the CPU kernels against PyTorch
# make test-integrations    the adapters, each beside its real host trainer (HOSTS=trl: that one);
# make bench-integrations   a host's step with and without them
# make cuda     the CUDA kernels too, for 8.0 and 9.0a (make cuda-all: for every architecture); needs
#               nvcc, but no GPU
# make lint     ruff, mypy, clang-format
# make venv     only what the others begin with: .venv and the kernels; make clean removes everything
#
# .venv is made on first use from VENV_PYTHON (python3), with pinned packages and a CPU-only torch.
# Another torch (a pip requirement, options may follow):
#                                make demo TORCH='torch==2.11.0'
# An existing environment, used as it is. Nothing is installed; tests skip what it lacks:
#                                PYTHON=/that/python make test
VENV_PYTHON ?= python3

# The host trainers in pinned versions, and the oldest and the newest transformers, each in a folder
# that goes before .venv (requirements/hosts).
HOSTS ?= trl trl-1.12 verl openrlhf transformers-5.0 transformers-5.24

ifdef PYTHON
  RUN := $(PYTHON)
else
  RUN := .venv/bin/python
  # Which torch is installed is part of the name, so that asking for another one installs it.
  STAMP := .venv/.installed-$(shell echo '$(TORCH)' | cksum | cut -d ' ' -f 1)
  COMMAND := .venv/bin/rlhf-train
  EXTRAS := .venv/.triton .venv/.deepspeed
  FOLDERS := $(HOSTS:%=.venv/hosts/.%)
endif
# A process a core, one thread each: tests this small lose by threads (those of threads set their own).
PARALLEL = $(shell $(RUN) -c 'import xdist' 2>/dev/null && \
             echo --numprocesses=auto --maxprocesses=8 --dist=worksteal -p no:benchmark)
export PYTHONPATH := $(CURDIR):$(CURDIR)/python$(if $(PYTHONPATH),:$(PYTHONPATH))

BESIDE = PYTHONPATH=$(CURDIR)/.venv/hosts/$$host:$$PYTHONPATH

.PHONY: demo test test-integrations bench bench-integrations cuda cuda-all lint venv build clean

demo: build
	$(RUN) -m rlhf_trainer demo $(if $(SEED),--seed $(SEED)) $(ARGS)

# Triton's kernels are tested under its interpreter, which has to be on before anything is imported.
# Status 5: what ARGS selects has no such test.
test: build $(EXTRAS)
	$(if $(PARALLEL),OMP_NUM_THREADS=1) $(RUN) -m pytest $(PARALLEL) $(ARGS)
	if $(RUN) -c 'import triton' 2>/dev/null; then TRITON_INTERPRET=1 OMP_NUM_THREADS=1 \
	  $(RUN) -m pytest $(PARALLEL) $(ARGS) || [ $$? -eq 5 ]; fi

test-integrations: build $(FOLDERS)
	set -e; for host in $(HOSTS); do echo "beside $$host:"; $(BESIDE) OMP_NUM_THREADS=1 \
	  $(RUN) -m pytest $(PARALLEL) tests/integrations/test_$${host%-*}.py $(ARGS); done

bench-integrations: build $(FOLDERS)
	set -e; for host in $(filter-out transformers%,$(HOSTS)); do echo "beside $$host:"; $(BESIDE) \
	  $(RUN) benchmarks/integrations/$${host%-*}.py $(ARGS); done

bench: build
	$(RUN) -m pytest benchmarks $(ARGS)

cuda: export RLHF_KERNELS_CUDA_ARCH = 8.0;9.0a
cuda cuda-all: export RLHF_KERNELS_CUDA = 1
cuda cuda-all: build

lint: $(STAMP)
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m mypy
	$(RUN) -c 'import clang_format; clang_format.clang_format()' --dry-run --Werror \
	  $(wildcard csrc/*.* csrc/*/*.* tests/*/*.h tests/*/*.cpp)

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

# For the tests alone: no GPU is needed to interpret and to compile kernels. 3.6 is the oldest that is
# supported, and only compiles. Triton exists for Linux; without it its tests are skipped.
.venv/.triton: $(STAMP)
	$(RUN) -c 'import triton' 2>/dev/null || $(RUN) -m pip install --quiet --no-deps triton==3.9.0 \
	  || echo 'no Triton here: its tests will be skipped'
	$(RUN) -m pip install --quiet --no-deps --target .venv/triton-3.6 triton==3.6.0 || true
	touch $@

.venv/hosts/.%: requirements/hosts/%.txt $(STAMP)
	rm -rf .venv/hosts/$*
	$(RUN) -m pip install --quiet --no-compile --no-deps --no-build-isolation --target .venv/hosts/$* -r $<
	touch $@

# For the test of ZeRO-3, over processes on the CPU.
.venv/.deepspeed: $(STAMP)
	$(RUN) -m pip install --quiet --no-deps --no-build-isolation --target .venv/deepspeed \
	  deepspeed==0.19.6 einops==0.8.2 hjson==3.1.0 msgpack==1.2.4 \
	  || echo 'no DeepSpeed here: its test will be skipped'
	touch $@

$(COMMAND): $(STAMP) pyproject.toml
	$(RUN) setup.py --quiet build_ext --inplace
	PYTHONWARNINGS=ignore $(RUN) -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@
