# make demo, test, lint, bench and test-integrations from a clean clone: Python 3.10+, a C++ compiler
# and make are all they need. Each makes the environment it runs in and leaves it for the next.
PYTHON ?= python3
VENV := .venv
VENV_INTEGRATIONS := .venv-integrations
CONSTRAINTS := constraints.txt

# -c does not reach the isolated build; the environment does, by a new name from pip 25.3 on
export PIP_CONSTRAINT := $(CONSTRAINTS)
export PIP_BUILD_CONSTRAINT := $(CONSTRAINTS)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
INSTALL := bin/python -m pip install --quiet -c $(CONSTRAINTS)

BUILD_INPUTS := setup.py pyproject.toml $(CONSTRAINTS) $(shell find csrc -type f)
CXX_FILES := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.inc' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo test lint bench test-integrations clean

demo: $(VENV)/.installed
	$(VENV)/bin/python -m dpo_kernels demo $(DEMO_ARGS)

test: $(VENV)/.installed
	$(VENV)/bin/python -m pytest $(TEST_ARGS)

bench: $(VENV)/.installed
	$(VENV)/bin/python -m dpo_kernels bench $(BENCH_ARGS)

lint: $(VENV)/.lint
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES)

test-integrations: $(VENV_INTEGRATIONS)/.installed
	$(VENV_INTEGRATIONS)/bin/python -m pytest $(wildcard tests/test_integrations*.py) $(TEST_ARGS)

clean:
	rm -rf $(VENV) $(VENV_INTEGRATIONS) build dpo_kernels.egg-info dpo_kernels/_C*.so

$(VENV)/.created $(VENV_INTEGRATIONS)/.created:
	$(PYTHON) -m venv $(@D)
	touch $@

# torch by itself and first: nothing else then chooses another, larger one
%/.torch: %/.created $(CONSTRAINTS)
	$*/$(INSTALL) torch
	touch $@

$(VENV)/.lint: $(VENV)/.created $(CONSTRAINTS)
	$(VENV)/$(INSTALL) ruff clang-format
	touch $@

$(VENV)/.installed: $(VENV)/.torch $(BUILD_INPUTS)
	$(VENV)/$(INSTALL) -e '.[triton,test,demo]'
	touch $@

$(VENV_INTEGRATIONS)/.installed: $(VENV_INTEGRATIONS)/.torch $(BUILD_INPUTS)
	$(VENV_INTEGRATIONS)/$(INSTALL) -e '.[triton,test,trl]' liger-kernel
	touch $@

# a stamp is no use half-way: make removes what a failed command leaves
.DELETE_ON_ERROR:
.PRECIOUS: %/.created %/.torch
