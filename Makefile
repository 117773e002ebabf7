# The habits of this repository, one word each. They use the environment that is active.

.DEFAULT_GOAL := help
.PHONY: help develop format lint types test rust python stateful arm bench compare ci

help: ## list these
	@sed -n 's/^\([a-z]*\):.*## /\1|/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "make %-10s %s\n", $$1, $$2 }'

develop: ## build the extension in place, with everything tests and benches need
	pip install --group dev
	maturin develop --release --extras test,bench

format: ## format Rust and Python
	cargo fmt --all
	ruff format .
	ruff check --fix .

lint: ## what must be clean before a commit
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
	ruff format --check .
	ruff check .

types: ## check annotations, and the stubs against the compiled module
	mypy
	python -m mypy.stubtest futurefill_rs._core

test: rust python ## all tests

rust: ## tests of the engine
	cargo test -p futurefill

python: ## tests of the package
	pytest

stateful: ## random operations on caches, with replays of failures: make stateful ARGS="--minutes 60"
	python tests/stateful.py $(ARGS)

arm: ## tests of the engine for AArch64 under emulation: on Debian 12, as root
	bash .ci/arm

bench: ## closed-loop generation in the core: make bench ARGS="256 14 auto"
	cargo bench -p futurefill --bench online -- $(ARGS)

compare: ## ourselves beside every rival: make compare ARGS=--quick
	python benches/compare.py $(ARGS)

ci: ## everything, in a fresh environment
	bash .ci/run
