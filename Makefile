# Everything that people and CI run. `make demo` and `make test` do all their set-up on a machine with git, make and Python 3.11.

PYTHON ?= python3
PY ?= .venv/bin/python
OUT ?= out
export PYTHONUNBUFFERED = 1
# Threads that wait for each other give their core up; train/dit.py says why.
export GOMP_SPINCOUNT ?= 3000

# Set-up is needed only for our own environment: `make test PY=python3` uses the one you name, as it is.
STAMP := .venv/.installed
READY = $(if $(filter .venv/bin/python,$(PY)),$(STAMP))

# Much of the tests' time is Python on one core: JOBS workers share them, where pytest-xdist is installed. Each and what it starts has one
# thread; the tests of threads set their number themselves. A worker that is through takes half of what another one has left.
JOBS ?= 2
PARALLEL = $(shell $(PY) -c 'import xdist' 2>/dev/null && echo --numprocesses=$(JOBS) --dist=worksteal)

# The source tree before what PYTHONPATH has: for a Python in which the project is not installed.
ON_PATH = PYTHONPATH="$(CURDIR):$(CURDIR)/kernels$${PYTHONPATH:+:$$PYTHONPATH}"
# On a GPU machine whose own Python has torch and triton, no set-up (and so no network) is needed.
GPU_PY = $(ON_PATH) $(if $(filter-out .venv/bin/python,$(PY)),$(PY),$(if $(wildcard .venv/bin/python),.venv/bin/python,python3))

.PHONY: help setup demo test test-newest newest lint audit bench bench-check growth chaos levers fuzz convergence convergence-smoke report assets test-gpu bench-gpu rehearse clean

help:
	@echo "setup      .venv with the exact versions of constraints.txt"
	@echo "demo       train on the bundled digits and draw some; ARGS='--steps 100' adds flags"
	@echo "test       all tests, JOBS=2 at a time; ARGS='-n 0 -x -k name' adds flags"
	@echo "test-newest    the tests of kernels, model and training, and the audit, with the newest torch and triton: constraints-newest.txt; sets up .venv too"
	@echo "newest     moves constraints-newest.txt up to what pip installs today"
	@echo "lint       ruff      audit   the machine code of the Triton kernels, without a GPU"
	@echo "bench      microbenchmarks on this machine      report   tables and plots from bench/results"
	@echo "bench-check      fails where an op or a stage is over 15 % slower than bench/results/check_cpu.json; ARGS=--update rewrites that"
	@echo "growth     how a training step's time and memory grow with batch, tokens, width and depth"
	@echo "chaos      100 trainings that are killed, starved and damaged, and must end as if nothing had been; ARGS='--runs 20 --seed 1'"
	@echo "fuzz       10,000 damaged configurations, checkpoints, latent stores and images; ARGS='--examples 5000 --seed 1'"
	@echo "levers     the options beyond bf16 and AdamW, each against the training without it: docs/levers.md"
	@echo "convergence              from DiT to LightningDiT on aligned latents, distance against images and time: an hour of a GPU, in stages"
	@echo "convergence-smoke        the same on the digits, minutes on a CPU"
	@echo "assets     remake the bundled tokenizer"
	@echo "test-gpu, bench-gpu      the CUDA tests and benchmarks, results in OUT=$(OUT)"
	@echo "rehearse   both of them without a GPU, under a stand-in CUDA driver, hours on 2 cores; ARGS=--short takes minutes"
	@echo "clean      remove what builds and tests left (not .venv, not .venv-newest, not runs)"

setup: $(STAMP)

# Python compiles what is imported, a fraction of what is installed.
$(STAMP): setup.py constraints.txt pyproject.toml CMakeLists.txt $(wildcard kernels/csrc/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed; $(PYTHON) is: $$($(PYTHON) --version 2>&1). Name another: make setup PYTHON=python3.12" >&2; exit 1; }
	@echo "Packages go into .venv: minutes, and 6 GB"
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --no-compile --constraint constraints.txt --editable '.[dev]'
	@.venv/bin/python -m lightningdit_kernels
	@touch $@

demo: $(READY)
	$(PY) train/dit.py $(ARGS)

test: $(READY)
	$(if $(PARALLEL),OMP_NUM_THREADS=1 )$(PY) -m pytest tests $(PARALLEL) $(ARGS)

# The newest stack: what `pip install` gives a newcomer today. Only what depends on torch's and triton's versions is run again.
# AUDIT='--arch 90 --launched' audits what training launches on Hopper, as CI does to save time.
NEWEST := .venv-newest/bin/python
NEWEST_TESTS := tests/kernels $(addprefix tests/test_,$(addsuffix .py,model flow sampler solvers optim checkpoint levers checkpointing)) \
  tests/rehearsal/test_graphs.py $(addprefix tests/test_train_distributed.py::test_,only_calls_that_wait_are_counted the_warning_is_worded_as_the_installed_pytorch_words_it)

test-newest: $(STAMP) .venv-newest/.installed
	$(ON_PATH) OMP_NUM_THREADS=1 $(NEWEST) -m pytest $(NEWEST_TESTS) --numprocesses=$(JOBS) --dist=worksteal $(ARGS)
	$(ON_PATH) $(NEWEST) -m lightningdit_kernels.audit $(AUDIT)

# The project need not be installed here: it runs from the source tree, with the native library that .venv's installation built there,
# whose C interface knows nothing of torch. So that one is set up first, also where PY names another Python.
.venv-newest/.installed: constraints-newest.txt
	@echo "Packages go into .venv-newest: minutes, and 6 GB"
	$(PYTHON) -m venv --clear .venv-newest
	$(NEWEST) -m pip install --no-compile --requirement constraints-newest.txt
	@touch $@

newest:
	$(PYTHON) -m venv --clear .venv-newest
	$(NEWEST) -m pip install --quiet --editable '.[test]'
	$(NEWEST) -m pip freeze --exclude-editable > .venv-newest/frozen.txt
	{ sed '/^[^#]/,$$d' constraints-newest.txt; cat .venv-newest/frozen.txt; } > .venv-newest/constraints.txt
	mv .venv-newest/constraints.txt constraints-newest.txt
	@touch .venv-newest/.installed

lint: $(READY)
	$(PY) -m ruff check .

audit: $(READY)
	PYTHONPATH=kernels $(PY) -m lightningdit_kernels.audit $(ARGS)

bench: $(READY)
	$(PY) -m pytest bench --benchmark-only $(ARGS)

bench-check: $(READY)
	$(PY) bench/check.py $(ARGS)

growth: $(READY)
	$(PY) -m pytest bench/bench_growth.py --benchmark-only --device cpu --results bench/results/growth_cpu.json $(ARGS)

chaos: $(READY)
	$(PY) bench/chaos.py --out bench/results/chaos_cpu.json $(ARGS)

fuzz: $(READY)
	$(PY) bench/fuzz.py --out bench/results/fuzz_cpu.json $(ARGS)

# bf16 residual, Muon, batched adaLN, split-K, float8, each against the training without it.
levers: $(READY)
	$(PY) bench/levers.py $(ARGS)

# Says how long it will take before it begins; what is done is kept. ARGS='--budget-s 540' ends in time, Error 3 then means: run it again.
convergence: gpu-present
	$(GPU_PY) bench/convergence.py --size full --publish $(ARGS)

convergence-smoke: $(READY)
	$(PY) bench/convergence.py --size smoke --device cpu --publish $(ARGS)

assets: $(READY)
	$(PY) train/vavae.py --tokenizer-out lightningdit/assets/digits_tokenizer.safetensors --encoder-out lightningdit/assets/digits_encoder.safetensors $(ARGS)

test-gpu bench-gpu: gpu-present

.PHONY: gpu-present
gpu-present:
	@$(GPU_PY) -c 'import sys; from importlib.util import find_spec; \
	  missing = [name for name in "torch triton numpy safetensors pytest pytest_benchmark".split() if not find_spec(name)]; \
	  sys.exit(f"{sys.executable} lacks {missing}: docs/gpu.md says what is needed" if missing else None)'
	@$(GPU_PY) -c 'import torch, sys; sys.exit(None if torch.cuda.is_available() else "no CUDA device is visible to torch")'
	@mkdir -p $(OUT)

test-gpu:
	$(GPU_PY) bench/gpu_tests.py --out $(OUT) $(ARGS)

# Stages of at most 9 minutes; run it again to continue. ARGS='--budget-s 540' ends in time, ARGS='--stage norm_1' does one: docs/gpu.md.
bench-gpu:
	$(GPU_PY) bench/gpu.py --out $(OUT) $(ARGS)

# All but the arithmetic of test-gpu and bench-gpu, as an 80 GB and as a 141 GB card: tests/rehearsal/__main__.py says what that can find.
rehearse: $(READY)
	PYTHONPATH=.:kernels:tests $(PY) -m rehearsal $(ARGS)

report: $(READY)
	$(PY) bench/report.py $(ARGS)

clean:
	rm -rf build *.egg-info .pytest_cache .ruff_cache .benchmarks .hypothesis out
	find . -name __pycache__ -not -path './.venv*/*' -prune -exec rm -rf {} +
