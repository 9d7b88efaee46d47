# memleak: `make run` shows it at work, `make test` checks everything, `make help` lists the rest.

SHELL := /bin/sh
CC ?= gcc
PREFIX ?= /usr/local

# Under sudo the toolchain is that of the user who called it.
ifneq ($(SUDO_USER),)
ifneq ($(SUDO_USER),root)
CALLER_HOME := $(shell getent passwd $(SUDO_USER) | cut -d: -f6)
export CARGO_HOME ?= $(CALLER_HOME)/.cargo
export RUSTUP_HOME ?= $(CALLER_HOME)/.rustup
endif
endif
export CARGO_HOME ?= $(HOME)/.cargo
export PATH := $(CARGO_HOME)/bin:$(PATH)

TARGET := $(or $(CARGO_TARGET_DIR),target)
MEMLEAK := $(TARGET)/release/memleak
DEMO := $(TARGET)/demo/memleak-demo
# Building is done as the user, also under sudo; only what needs root has it.
AS_USER := tests/as_user.sh

C_SOURCES := $(wildcard probes/bpf/*.c probes/bpf/*.h tests/programs/*.c tests/programs/*.h tests/programs/*.cc tests/demo/*.c tests/bench/programs/*.c tests/vm/leakmod/*.c)
CLANG_FORMAT ?= $(or $(shell command -v clang-format-19),clang-format)

.DEFAULT_GOAL := help
.PHONY: help run test test-kernels bench bench-bars recordings lint format build install uninstall setup clean root toolchain

help: ## list what can be made
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## (.*)/make \1|\2/' | column -t -s '|'

root:
	@if [ "$$(id -u)" -ne 0 ]; then \
		echo 'make: loading BPF programs and installing packages need root; go on with: sudo make run' >&2; exit 1; fi

toolchain:
	@command -v cargo >/dev/null || { \
		echo 'make: no Rust toolchain found: install one from https://rustup.rs, then run this again' >&2; exit 1; }

setup: ## install the system packages for build and tests (root)
	tests/setup.sh test

run: root toolchain ## build, and watch a demo service that leaks (root; about 30 s once built)
	tests/setup.sh build
	$(MAKE) --no-print-directory build $(DEMO)
	tests/demo/run.sh $(MEMLEAK) $(DEMO)

build: toolchain ## build the memleak binary (target/release/memleak)
	$(AS_USER) cargo build --release --package memleak

$(DEMO): tests/demo/memleak-demo.c
	$(AS_USER) mkdir -p $(dir $@)
	$(AS_USER) $(CC) -O2 -g -fno-omit-frame-pointer -Wall -Wextra -pthread -o $@ $<

# As root everything is tested. Otherwise tests that attach to processes are skipped, with a note each.
test: toolchain ## set up and run every test (root for all of them)
	tests/setup.sh test
	@if [ "$$(id -u)" -ne 0 ]; then \
		echo 'make: not root: tests that attach to processes are skipped; all of them run with: sudo make test' >&2; fi
	$(AS_USER) cargo test --workspace --no-run
	cargo test --workspace; code=$$?; \
		[ -z "$$SUDO_USER" ] || chown -R "$$SUDO_USER:" $(TARGET); \
		exit $$code

# make test-kernels KERNELS="5.10 7.2" TESTS="userspace::glibc"; tests/vm/run.sh says more.
test-kernels: toolchain ## boot 5.10, 6.1, 6.12 and 7.2 in virtual machines and test in each (some 10 minutes)
	tests/setup.sh kernels
	$(AS_USER) env TESTS="$(TESTS)" tests/vm/run.sh $(KERNELS)

# make bench ROUNDS=1 SECONDS=1 WORKLOADS=loop,redis-set TOOLS=exact,valgrind; docs/benchmarks.md says more.
bench: toolchain ## measure what memleak costs real programs (root; about an hour, a minute with ROUNDS=1 SECONDS=1 WORKLOADS=loop)
	tests/setup.sh bench
	$(AS_USER) cargo build --release --package memleak --package memleak_bench
	$(TARGET)/release/memleak_bench --memleak $(MEMLEAK) --json $(TARGET)/bench.json $(if $(ROUNDS),--rounds $(ROUNDS)) \
		$(if $(SECONDS),--seconds $(SECONDS)) --workloads "$(WORKLOADS)" $(if $(BARS),--bars,--tools "$(TOOLS)"); code=$$?; \
		[ -z "$$SUDO_USER" ] || chown "$$SUDO_USER:" $(TARGET)/bench.json; \
		exit $$code

bench-bars: ## measure what memleak promises, and judge it (root; about 22 minutes; ROUNDS and SECONDS as above)
	$(MAKE) --no-print-directory bench BARS=1

recordings: root toolchain build ## record anew the shapes that rules are tested with (root; ten minutes)
	tests/record_shapes.sh $(MEMLEAK)

lint: toolchain ## check formatting, lints and documentation
	tests/setup.sh lint
	cargo fmt --all --check
	$(CLANG_FORMAT) --dry-run -Werror $(C_SOURCES)
	for source in tests/programs/*.c tests/demo/*.c tests/bench/programs/*.c; do \
		$(CC) -O2 -Wall -Wextra -Werror -fsyntax-only $$source || exit 1; done
	$(AS_USER) cargo clippy --workspace --all-targets -- -D warnings
	$(AS_USER) env RUSTDOCFLAGS='-D warnings' cargo doc --workspace --no-deps
	@if command -v cargo-deny >/dev/null; then cargo deny --offline check licenses bans sources; \
		else echo 'make: cargo-deny is not installed: licences of dependencies are not checked'; fi

format: toolchain ## format all sources
	cargo fmt --all
	$(CLANG_FORMAT) -i $(C_SOURCES)

install: build ## install to PREFIX (default /usr/local)
	install -D -m 755 $(MEMLEAK) $(DESTDIR)$(PREFIX)/bin/memleak
	install -d $(DESTDIR)$(PREFIX)/share/man/man1 $(DESTDIR)$(PREFIX)/share/bash-completion/completions
	$(MEMLEAK) man >$(DESTDIR)$(PREFIX)/share/man/man1/memleak.1
	$(MEMLEAK) completions bash >$(DESTDIR)$(PREFIX)/share/bash-completion/completions/memleak

uninstall: ## remove what install has put there
	rm -f $(DESTDIR)$(PREFIX)/bin/memleak $(DESTDIR)$(PREFIX)/share/man/man1/memleak.1 \
		$(DESTDIR)$(PREFIX)/share/bash-completion/completions/memleak

clean: ## remove everything that was built
	$(AS_USER) cargo clean
