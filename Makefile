# tote: build, test, demonstrate. `make help` lists the targets.

CARGO ?= cargo
export CARGO_TERM_PROGRESS_WHEN ?= auto

# The operator's programs are static, and those that package and show it are built in the same run, so that what both
# depend on is compiled once. The target is named: build scripts and macros must not be linked like that.
STATIC_TARGET := $(shell uname -m)-unknown-linux-gnu
STATIC = RUSTFLAGS="-C target-feature=+crt-static" $(CARGO) build --locked --release --target $(STATIC_TARGET) \
	-p tote-controller -p tote-agent -p tote-e2e
BUILT := $(or $(CARGO_TARGET_DIR),target)/$(STATIC_TARGET)/release

.DEFAULT_GOAL := help
.PHONY: help demo test bench check lint crds image clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-7s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: ## see it work: a real cluster, a stopped registry, a pod that runs all the same (root; KEEP=1 leaves it up)
	@e2e/tools.sh all
	@$(MAKE) --no-print-directory image
	@$(BUILT)/demo

test: ## every test there is, on real containerds and a real cluster (root)
	@e2e/tools.sh all
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory image
	@$(CARGO) test --workspace

bench: ## measure times and memory on a cluster of its own (root)
	@e2e/tools.sh all
	@$(MAKE) --no-print-directory image
	@$(BUILT)/figures

check: lint ## the tests that need neither root nor a cluster
	@$(CARGO) test --workspace --lib --bins --test agents --test fake --test import --test notify --test previous --test program --test tls

lint: ## formatting and lints, warnings denied
	@e2e/tools.sh build
	@$(CARGO) fmt --all -- --check
	@$(CARGO) clippy --workspace --all-targets -- -D warnings

crds: ## write the CRDs again (config/crd, charts/tote/files/crds)
	@$(CARGO) run -q -p tote-api --bin crdgen -- --write

image: ## the operator's image: target/image/tote.tar, an OCI archive
	@e2e/tools.sh build
	@$(STATIC)
	@$(BUILT)/mkimage

clean: ## take down what demo and tests left, and remove target/ (the cache of built programs stays)
	@for built in $(BUILT) target/debug; do \
		if [ "$$(id -u)" = 0 ] && [ -x $$built/demo ] && [ -x $$built/cluster ]; then \
			$$built/demo down; for name in test figures load dev selftest killed; do $$built/cluster --name $$name down; done; break; fi; done
	@$(CARGO) clean
