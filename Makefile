# make demo   from a fresh clone to a robot policy that has learned something, in under ten minutes
# make test   everything CI runs
PY := .venv/bin/python
export HF_HUB_OFFLINE ?= 1

.PHONY: setup test test-long demo lint format bench clean

setup:
	@scripts/bootstrap

test: setup lint
	$(PY) -m pytest -n 2 --dist loadfile $(ARGS)

test-long: setup
	$(PY) -m pytest -m long $(ARGS)

demo: setup
	@.venv/bin/vla-post demo $(ARGS)

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright
	.venv/bin/lint-imports

format: setup
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: setup
	$(PY) -m pytest benchmarks --benchmark-only --benchmark-disable-gc $(ARGS)

clean:
	rm -rf .venv build dist *.egg-info
