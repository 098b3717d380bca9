# tote: build, test, demonstrate. `make help` lists the targets.

CARGO ?= cargo
export CARGO_TERM_PROGRESS_WHEN ?= auto

.DEFAULT_GOAL := help
.PHONY: help test check lint crds image clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-7s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

test: ## every test there is (root)
	@e2e/tools.sh all
	@$(MAKE) --no-print-directory check
	@$(CARGO) test -p tote-e2e

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
	@$(CARGO) run -q -p tote-e2e --bin mkimage

clean: ## remove target/ (the cache of built programs stays)
	@$(CARGO) clean
