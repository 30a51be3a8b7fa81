# rldiff: `make run` does the main job, `make test` passes the tests, both set up what they need first.
#
#   make build     target/release/rldiff, which then runs without any environment set
#   make run       joint fine-tuning of the embedded miniature under mpirun (RANKS=2, ARGS="--set run.iterations=2")
#   make test      format, clippy, docs, unit and integration tests, mpirun at 1, 2 and 4 ranks
#   make torture   the tests that take longer
#   make test-gpu  kernels and program on a GPU, ranks on several; skips, and says why, where there is none or one only
#                  (RLDIFF_REQUIRE_GPU=1, or 2: fails)
#   make parity GOLDENS=DIR   the networks against reference numbers made with diffusers
#   make bundle    what another host needs, as target/bundle/rldiff-VERSION-ARCHITECTURE.tar.gz
#   make setup     only the set-up          eval "$(make -s env)"   the launcher in use on the PATH
#
# RLDIFF_CUDA=1 make build installs libtorch with CUDA on a machine without NVIDIA's driver (a login node); 0 without CUDA.
# A machine's own parts are used where these are set: MPICC (an MPI compiler wrapper), LIBTORCH (libtorch 2.11.0),
# HDF5_DIR (HDF5 1.10.7 or later). What is not set comes from a venv in this folder, installed without root.

SHELL := /bin/bash
.DEFAULT_GOAL := build
.PHONY: setup build run test test-gpu torture parity bundle env check-format clippy docs clean

VENV := $(CURDIR)/.venv
export RLDIFF_VENV := $(VENV)
ENVIRONMENT := source tools/environment.sh
CARGO_FLAGS := --release --locked $(if $(HDF5_DIR),--no-default-features)
# Python with diffusers, h5py and tensorboard, which some tests compare with; set the variable to use your own
TEST_PYTHON := export RLDIFF_TEST_PYTHON="$${RLDIFF_TEST_PYTHON:-$$(tools/setup-tests.sh)}"
# a Slurm cluster of four virtual nodes, where root and the packages are at hand
TEST_SLURM := tools/setup-slurm.sh
# a browser for the pages of human-eval and report, in the same way
TEST_BROWSER := tools/setup-browser.sh
RANKS ?= 2
ARGS ?=

setup:
	@tools/setup.sh

build: setup
	@$(ENVIRONMENT) && cargo build $(CARGO_FLAGS)

run: build
	@$(ENVIRONMENT) && if [ -t 1 ]; then export RLDIFF_PROGRESS=$${RLDIFF_PROGRESS:-bar} COLUMNS=$$(tput cols); fi && \
		"$$RLDIFF_MPIRUN" $$RLDIFF_MPIRUN_FLAGS -n $(RANKS) target/release/rldiff $(ARGS)

check-format:
	cargo fmt --check

clippy: setup
	@$(ENVIRONMENT) && cargo clippy $(CARGO_FLAGS) --all-targets -- -D warnings

docs: setup
	@$(ENVIRONMENT) && RUSTDOCFLAGS="-D warnings" cargo doc $(CARGO_FLAGS) --no-deps --document-private-items

test: check-format build clippy docs
	@$(ENVIRONMENT) && $(TEST_PYTHON) && $(TEST_SLURM) && $(TEST_BROWSER) && cargo test $(CARGO_FLAGS)

test-gpu: build
	@$(ENVIRONMENT) && cargo test $(CARGO_FLAGS) --test gpu_kernels --test gpu --test gpu_ranks -- --nocapture

torture: build
	@$(ENVIRONMENT) && $(TEST_PYTHON) && $(TEST_SLURM) && $(TEST_BROWSER) && cargo test $(CARGO_FLAGS) -- --include-ignored

parity: setup
	@test -n "$(GOLDENS)" || { echo "usage: make parity GOLDENS=DIR [GOLDENS2=DIR] (folders with MANIFEST.json)" >&2; exit 2; }
	@$(ENVIRONMENT) && RLDIFF_GOLDENS="$(abspath $(GOLDENS))" $(if $(GOLDENS2),RLDIFF_GOLDENS2="$(abspath $(GOLDENS2))") cargo test $(CARGO_FLAGS) --test parity -- --nocapture

bundle: build
	@$(ENVIRONMENT) && tools/bundle.sh target/release/rldiff target/bundle

env: setup
	@$(ENVIRONMENT) && echo "export PATH=\"$$(dirname "$$RLDIFF_MPIRUN"):\$$PATH\""

clean:
	rm -rf target
