# The environment is .venv; a stamp file in it says what was installed, so a second call is quick.
python := .venv/bin/python
setup_from := pyproject.toml tools/setup_env.sh
kernels := $(wildcard $(addprefix kernels/cpu/,CMakeLists.txt *.cpp *.h binding/*.cpp binding/*.h))
# A compiler that came later than the environment: set it up again.
retry := $(and $(wildcard .venv/run.stamp),$(if $(wildcard tiny_llm/_cpu*.so),,$(shell command -v c++ 2>/dev/null)),again)

# Kernels alone, without Python or MLX: $(call kernel_tests,CMake's options,what runs them)
cores := $(shell getconf _NPROCESSORS_ONLN)
kernel_tests = PATH="$(CURDIR)/.venv/bin:$$PATH" && \
	cmake -S kernels/cpu -B build/$@ -DTINY_LLM_MODULE=OFF $(1) >/dev/null && \
	cmake --build build/$@ --target kernel_tests --parallel $(cores) && $(2) build/$@/kernel_tests

# The CMake that built the module, which lies beside its sources.
module_cmake = $$(sed -n 's/^CMAKE_COMMAND:INTERNAL=//p' kernels/cpu/CMakeCache.txt)

MAKEFLAGS += --no-print-directory
# Tests start hundreds of processes that load the package: they find it compiled, as elsewhere.
unexport PYTHONDONTWRITEBYTECODE
.DEFAULT_GOAL := help
# One environment: not to be set up twice at once.
.NOTPARALLEL:
.PHONY: help run test quick course book book-serve book-experiments bench mac metal-grid templates clients soak kernels-test asan tsan arm64 fuzz clean again

help:
	@echo 'make run     set up and chat with the bundled model'
	@echo 'make test    set up and run everything that CI runs'
	@echo 'make quick   the same without what takes long: for the loop of writing and trying'
	@echo 'make course  set up and show the chapters of the course'
	@echo 'make book    build the book into book/site (npm is needed once); make book-serve shows it,'
	@echo '             make book-experiments runs what its pages show, and puts the results there'
	@echo 'make bench   run the benchmarks'
	@echo 'make mac     on a Mac: kernel tests, proofs, speed against mlx-lm; a report to paste into an issue'
	@echo 'make soak    20 minutes of mixed traffic: does the server last?'
	@echo 'make templates  published chat templates, fetched: our rendering against transformers'
	@echo 'make clients    clients of others (instructor, litellm, lm-eval, openai for node, Ray ...) against our server'
	@echo 'make clean   remove the environment and every cache'
	@echo
	@echo 'make kernels-test   the CPU kernels alone (C++); also asan, tsan: under sanitizers,'
	@echo '                    arm64: built for it and emulated; fuzz: 10,000 shapes against ref,'
	@echo '                    and 100 runs of the KV pool against a dictionary'
	@echo
	@echo 'PYTHON=/path/to/python chooses the Python (>= 3.11) for a new environment.'

run: .venv/run.stamp .venv/kernels.stamp
	@$(python) main.py

# Processes of their own share the cores, one more than there are, as some wait for servers that they started;
# one that is done takes tests from another.
pytest := $(python) -m pytest -n $(shell expr $(cores) + 1) --dist worksteal

test: .venv/test.stamp .venv/kernels.stamp
	$(python) -m ruff check
	$(python) -m ruff format --check
	$(python) -m mypy
	$(pytest) --durations=10

quick: .venv/test.stamp .venv/kernels.stamp
	$(python) -m ruff check
	$(python) -m ruff format --check
	$(python) -m mypy
	$(pytest) -m 'not slow' --durations=5

course: .venv/test.stamp .venv/kernels.stamp
	@$(python) main.py course list

book:
	@PYTHON='$(PYTHON)' sh book/build.sh build

book-serve:
	@PYTHON='$(PYTHON)' sh book/build.sh serve

book-experiments: .venv/test.stamp .venv/kernels.stamp
	$(python) book/regenerate.py

# One draws what it is given, one takes 20 minutes, one is make mac.
not_bench := benchmarks/plot_trace.py benchmarks/soak.py benchmarks/mac_report.py
bench: .venv/run.stamp .venv/kernels.stamp
	@for script in $(filter-out $(not_bench),$(wildcard benchmarks/*.py)); do echo "== $$script"; $(python) "$$script" || exit 1; done

soak: .venv/run.stamp .venv/kernels.stamp
	$(python) benchmarks/soak.py --minutes 20

# Of the objects that the module is made of, where it was built.
kernels-test:
	$(if $(wildcard kernels/cpu/build.ninja),$(module_cmake) --build kernels/cpu --target kernel_tests && \
		kernels/cpu/kernel_tests,$(call kernel_tests))

asan:
	$(call kernel_tests,-DTINY_LLM_SANITIZE=address$(comma)undefined)

# Older thread sanitizers do not know how far newer kernels scatter a process's memory.
tsan:
	$(call kernel_tests,-DTINY_LLM_SANITIZE=thread,$(shell setarch -R true 2>/dev/null && echo setarch -R))

arm64:
	@command -v aarch64-linux-gnu-g++ >/dev/null && command -v qemu-aarch64 >/dev/null || \
		{ echo 'make arm64 needs a cross compiler and an emulator: apt install g++-aarch64-linux-gnu qemu-user'; exit 1; }
	$(call kernel_tests,-DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
		-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++,qemu-aarch64 -L /usr/aarch64-linux-gnu)

fuzz: .venv/test.stamp .venv/kernels.stamp
	TINY_LLM_FUZZ=10000 $(python) -m pytest tests/native/test_fuzz.py tests/kv/test_moves.py

# All that is to be known of a Mac, with nothing to download but packages: some 15 minutes, one table.
mac: .venv/test.stamp .venv/kernels.stamp
	$(python) benchmarks/mac_report.py

# Published chat templates, fetched from the hub (or TEMPLATES=folder): our rendering and transformers'.
templates: .venv/test.stamp
	$(python) tools/compare_templates.py $(TEMPLATES)

# Clients of others, whose pins are not ours, in an environment of their own (minutes to make).
clients: .venv/run.stamp .venv/kernels.stamp .venv-clients/stamp .venv-ray/stamp build/clients-node/package.json
	.venv-clients/bin/python -m pytest clients --rootdir clients -c clients/pytest.ini

# An environment beside .venv: $(call environment,its folder,its requirements)
define environment
	@echo 'Setting up $(1) (once; some minutes) ...' >&2
	@if command -v uv >/dev/null; then \
		uv venv --quiet --clear --python $(python) $(1) && \
		uv pip install --quiet --python $(1)/bin/python -r $(2); \
	else \
		$(python) -m venv --clear $(1) && $(1)/bin/python -m pip install --quiet -r $(2); \
	fi
endef

.venv-clients/stamp: clients/requirements.txt
	$(call environment,$(@D),$<)
	@touch $@

# Ray's replicas run our checkout, and want what it wants.
.venv-ray/stamp: clients/ray.txt pyproject.toml
	@mkdir -p build && $(python) -c 'import tomllib; \
		print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' >build/ray.txt
	@cat $< >>build/ray.txt
	$(call environment,$(@D),build/ray.txt)
	@touch $@

build/clients-node/package.json: clients/node/package.json
	@mkdir -p $(@D) && cp $< $@.new && cd $(@D) && mv package.json.new package.json && \
		npm install --silent --no-audit --no-fund || { rm -f package.json; exit 1; }

# Every kernel, shape and dtype with three seeds, every access checked; CI takes one seed.
metal-grid: .venv/test.stamp
	TINY_LLM_METAL_GRID=full TINY_LLM_METALSIM=strict $(python) -m pytest tests/ops/test_metal.py \
		tests/sampling/test_metal_sampling.py

clean:
	rm -rf .venv .venv-clients .venv-ray build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis tiny_llm/_cpu*.so
	cd kernels/cpu && rm -rf .cmake .ninja_* .skbuild-info.json CMakeCache.txt CMakeFiles CMakeInit.txt \
		Makefile *.ninja *.cmake *.a kernel_tests
	find tiny_llm book tools tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/run.stamp: $(setup_from) $(retry)
	@PYTHON='$(PYTHON)' sh tools/setup_env.sh </dev/null
	@touch .venv/kernels.stamp $@

# The test extra contains all that `make run` needs.
.venv/test.stamp: $(setup_from) $(retry)
	@PYTHON='$(PYTHON)' sh tools/setup_env.sh test </dev/null
	@touch .venv/run.stamp .venv/kernels.stamp $@

# Compiles what has changed since; an error in a kernel stops make here.
.venv/kernels.stamp: $(kernels) | .venv/run.stamp
	@[ ! -f kernels/cpu/build.ninja ] || $(module_cmake) --build kernels/cpu
	@touch $@

again:
comma := ,
