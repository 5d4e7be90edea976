# make demo   a computation is checkpointed, killed with -9 and restored
# make test   everything; installs what the tests need
# make field   some 190 real programs, cut at random moments; installs them; not a part of make test
# make test-kernels  on other kernels, in virtual machines; not a part of make test
# make chaos  random jobs for a long time (docs/chaos.md): SEEDS=N jobs from SEED=N on, SECONDS=N at most, AS=user, ONLY=KIND,…
# make torture  the tool killed, stopped, made to fail (docs/reliability.md): SECONDS=N in all, or KILLS=N of attach and of
#             restore for each target; ONLY=TARGET, SEED=N
# make lint   imports, kinds of open files, unsafe code, formatting, licenses, clippy, documentation, the freestanding restorer
# make fuzz   images and snapshots that nobody wrote (fuzz/README.md): SECONDS=N for each of the two
# make bench  figures as ratios in one run (docs/performance.md)

CARGO ?= cargo
# One set of features everywhere, so that everything is built once.
FEATURES = --features faults

.PHONY: all demo test field chaos torture test-kernels lint bench fuzz install clean deps

all:
	$(CARGO) build --release

deps:
	@scripts/install-test-deps

demo:
	@scripts/install-build-deps
	@demo/run

test: deps
	@rm -rf target/test-skips
	fixtures/selfcheck.sh
	@scripts/run-tests
	@scripts/show-skips

field:
	@scripts/install-field-deps
	$(CARGO) build $(FEATURES)
	@tests/field/run

test-kernels:
	@scripts/install-test-deps
	@tests/kernels/run

SEEDS ?= 10000
SECONDS ?= 86400

chaos:
	@scripts/install-build-deps
	$(CARGO) build -p ckpt -p ckpt-fixtures --bins --features ckpt/faults
	target/debug/ckpt-chaos --jobs $(SEEDS) --seconds $(SECONDS) $(if $(SEED),--seed $(SEED)) $(if $(ONLY),--only $(ONLY)) \
		$(if $(filter user,$(AS)),--user)

torture: deps
	@rm -f target/torture
	CKPT_TORTURE_SECONDS=$(SECONDS) $(if $(KILLS),CKPT_TORTURE_KILLS=$(KILLS)) CKPT_TEST_LIMIT=86400 \
		CKPT_TORTURE_FIGURES=$(CURDIR)/target/torture $(if $(SEED),CKPT_SEED=$(SEED)) \
		$(CARGO) test $(FEATURES) --test e2e -- --test-threads=2 torture::$(ONLY)
	@cat target/torture

lint:
	@scripts/install-lint-deps
	scripts/check-imports
	scripts/check-kinds
	scripts/check-unsafe
	$(CARGO) fmt --all --check
	$(CARGO) deny check bans licenses sources
	$(CARGO) clippy --workspace --all-targets $(FEATURES) -- -D warnings
	CKPT_BLOB=1 $(CARGO) clippy -p ckpt-restorer --bin restorer --profile blob \
		--target-dir target/blob-lint -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --workspace --no-deps $(FEATURES)

bench:
	@scripts/install-build-deps
	$(CARGO) build --release
	$(CARGO) run --release -p ckpt-benches --bin ckpt-bench -- all

fuzz: SECONDS = 60
fuzz:
	CKPT_FORGERIES=1 CKPT_FUZZ_BASES=$(CURDIR)/fuzz/bases $(CARGO) test $(FEATURES) --test e2e -- --exact fuzzed::are_judged_soon
	cd fuzz && $(CARGO) run --bin seeds
	cd fuzz && $(CARGO) fuzz run image -- -rss_limit_mb=512 -timeout=10 -max_len=20000 -max_total_time=$(SECONDS)
	cd fuzz && $(CARGO) fuzz run snapshot -- -rss_limit_mb=512 -timeout=10 -max_len=64 -max_total_time=$(SECONDS)

install:
	$(CARGO) install --path .

clean:
	$(CARGO) clean
