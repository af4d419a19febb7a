# make quickstart   fine-tune a small model on the CPU (or the GPU, if there is one) and compare
# make test         run the tests
# make quality      compare with LoRA and AdaLoRA at equal budgets: hours, goes on where it ended
# make lint         check style and format
# make gpu          correctness and speed on a GPU, in under 10 minutes; installs nothing
# make clean        remove what was built; downloads in .cache and results in runs stay
#
# Each target but gpu installs what it needs into .venv first. Options: make quickstart QUICKSTART='--steps 400'

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_FLAGS ?= -qq
PIP := $(BIN)/python -m pip --disable-pip-version-check $(PIP_FLAGS) install
CPU_WHEELS := https://download.pytorch.org/whl/cpu
QUICKSTART ?=
QUALITY ?=
GPU ?=

# OpenMP threads that spin while they wait slow everything down as soon as anything else runs.
export GOMP_SPINCOUNT := 0
export OMP_WAIT_POLICY := PASSIVE

.PHONY: quickstart test quality lint gpu clean

quickstart: $(VENV)/quickstart.stamp
	$(BIN)/python examples/quickstart.py $(QUICKSTART)

test: $(VENV)/test.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# Options: make quality QUALITY='--tasks polarity --methods lora l1ra --seeds 3'
quality: $(VENV)/quality.stamp
	$(BIN)/python -m benchmarks.quality $(QUALITY)

lint: $(VENV)/dev.stamp
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

# In the Python that is there, with its torch and triton; needs no network. Options: make gpu GPU='--seconds 420 --out DIR'
gpu:
	$(PYTHON) -m benchmarks.gpu $(GPU)

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .hypothesis .ruff_cache .benchmarks

$(VENV)/python.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "make: $(PYTHON) is missing or older than 3.10. Name another one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { \
	    echo "make: $(PYTHON) has no venv module. On Debian or Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "creating $(VENV) ..."
	@$(PYTHON) -m venv --clear $(VENV)
	@touch $@

# Without an NVIDIA GPU the CPU build of torch comes first, alone from its own index, and the rest is held to it.
$(VENV)/%.stamp: pyproject.toml constraints-cpu.txt | $(VENV)/python.stamp
	@{ if nvidia-smi -L >/dev/null 2>&1; then \
	    echo "installing l1ra[$*] with CUDA ..." && $(PIP) -e '.[$*]'; \
	else \
	    echo "installing torch for the CPU ..." && \
	    $(PIP) --no-deps --retries 1 --extra-index-url $(CPU_WHEELS) -c constraints-cpu.txt torch && \
	    echo "installing l1ra[$*] ..." && $(PIP) -c constraints-cpu.txt -e '.[$*]'; \
	fi; } || { echo "make: the installation failed; make PIP_FLAGS= says more" >&2; exit 1; }
	@touch $@
