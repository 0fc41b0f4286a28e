# The environment is .venv; a stamp file in it says what was installed, so a second call is quick.
python := .venv/bin/python
setup_from := pyproject.toml tools/setup_env.sh

.DEFAULT_GOAL := help
.PHONY: help run test bench clean

help:
	@echo 'make run     set up and chat with the bundled model'
	@echo 'make test    set up and run everything that CI runs'
	@echo 'make bench   run the benchmarks'
	@echo 'make clean   remove the environment and every cache'
	@echo
	@echo 'PYTHON=/path/to/python chooses the Python (>= 3.11) for a new environment.'

run: .venv/run.stamp
	@$(python) main.py

test: .venv/test.stamp
	$(python) -m ruff check
	$(python) -m ruff format --check
	$(python) -m mypy
	$(python) -m pytest --durations=10

bench: .venv/run.stamp
	@for script in benchmarks/*.py; do echo "== $$script"; $(python) "$$script" || exit 1; done

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find tiny_llm tools tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/run.stamp: $(setup_from)
	@PYTHON='$(PYTHON)' sh tools/setup_env.sh </dev/null
	@touch $@

# The test extra contains all that `make run` needs.
.venv/test.stamp: $(setup_from)
	@PYTHON='$(PYTHON)' sh tools/setup_env.sh test </dev/null
	@touch .venv/run.stamp $@
