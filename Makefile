# tote: build, test, demonstrate. `make help` lists the targets.

CARGO ?= cargo
export CARGO_TERM_PROGRESS_WHEN ?= auto

.DEFAULT_GOAL := help
.PHONY: help demo test bench check lint crds image clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-7s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: ## see it work: a real cluster, a stopped registry, a pod that runs all the same (root; KEEP=1 leaves it up)
	@e2e/tools.sh all
	@$(MAKE) --no-print-directory image
	@$(CARGO) build -p tote-e2e --bins
	@target/debug/demo

test: ## every test there is, on real containerds and a real cluster (root)
	@e2e/tools.sh all
	@$(MAKE) --no-print-directory check
	@$(MAKE) --no-print-directory image
	@$(CARGO) test -p tote-e2e

bench: ## measure times and memory on a cluster of its own (root)
	@e2e/tools.sh all
	@$(MAKE) --no-print-directory image
	@$(CARGO) run -p tote-e2e --bin figures

check: lint ## the tests that need neither root nor a cluster
	@$(CARGO) test --workspace --exclude tote-e2e
	@$(CARGO) test -p tote-e2e --lib

lint: ## formatting and lints, warnings denied
	@e2e/tools.sh build
	@$(CARGO) fmt --all -- --check
	@$(CARGO) clippy --workspace --all-targets -- -D warnings

crds: ## write the CRDs again (config/crd, charts/tote/files/crds)
	@$(CARGO) run -q -p tote-api --bin crdgen -- --write

image: ## the operator's image: target/image/tote.tar, an OCI archive
	@e2e/tools.sh build
	@$(CARGO) run -p tote-e2e --bin mkimage

clean: ## take down what demo and tests left, and remove target/ (the cache of built programs stays)
	@if [ "$$(id -u)" = 0 ] && [ -x target/debug/cluster ]; then \
		target/debug/demo down; for name in test figures dev selftest killed; do target/debug/cluster --name $$name down; done; fi
	@$(CARGO) clean
