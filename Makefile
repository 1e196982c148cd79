# kv.run: `make run` serves the bundled demo, `make test` passes all tests. Both install what they need into .venv first.

PYTHON ?= python3
CARGO ?= cargo
VENV := .venv
BIN := $(VENV)/bin
UV := $(BIN)/uv pip
CONSTRAINTS := third_party/python-constraints.txt
DEMO := examples/demo
PORT ?= 3000
STAMPS := build/stamps

.DEFAULT_GOAL := help
.PHONY: help run ui test test-rust test-python check fmt docs install wheel gpu-check cuda bench bench-kernels tools native clean

help: ## What each target does
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F'\t' '{printf "  make %-13s %s\n", $$1, $$2}'

run: install ## Serve the demo model and its adapters on port 3000 (PORT=...)
	@$(BIN)/text-generation-launcher --model-id $(DEMO)/model --port $(PORT) --lora-dir $(DEMO)/adapters \
	  --lora-ids "$$(cd $(DEMO)/adapters && for a in */; do printf '%s=%s;' "$${a%/}" "$(DEMO)/adapters/$${a%/}"; done)"

ui: install $(STAMPS)/ui ## Compare base and adapters in the browser; needs `make run` beside it
	@$(BIN)/python examples/ui.py --url http://127.0.0.1:$(PORT)

test: install test-rust test-python ## All tests

test-rust:
	$(CARGO) test --release --locked --workspace

# Two processes take half the time of one, and about 3 GB each.
test-python: $(STAMPS)/test
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile kernels server examples benchmark

check: install $(STAMPS)/test ## Formats, lints, types and the rules of the house
	$(CARGO) fmt --all --check
	$(CARGO) clippy --release --locked --workspace --all-targets -- -D warnings
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q server/tests/test_house.py

fmt: $(STAMPS)/test ## Format all sources
	$(CARGO) fmt --all
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

install: tools $(STAMPS)/python $(STAMPS)/proto native ## Put the four text-generation-* programs into .venv/bin
	@$(CARGO) build --release --locked --quiet -p kvrun-dist
	@for name in launcher router server benchmark; do \
	  cmp -s target/release/text-generation-$$name $(BIN)/text-generation-$$name \
	    || install -m 755 target/release/text-generation-$$name $(BIN)/text-generation-$$name; done

tools:
	@PYTHON=$(PYTHON) sh third_party/check-tools.sh

native: $(STAMPS)/python
	@$(BIN)/python kernels/build.py

wheel: install $(STAMPS)/test ## Wheels for `pip install`, in dist/
	rm -rf dist && mkdir -p dist
	cd server && ../$(BIN)/maturin build --release --locked --out ../dist
	$(BIN)/uv build --quiet --wheel kernels --out-dir dist

docs: $(STAMPS)/test ## Renew the support table in the README
	PYTHONPATH=server:server/tests $(BIN)/python server/tests/support_table.py

gpu-check: install $(STAMPS)/test ## All parity tests on this machine's GPU, then its kernels' speed; ends with 14 where there is none
	@PYTHONPATH=server $(BIN)/python server/tests/gpu_check.py

cuda: $(STAMPS)/cuda ## Install what GPUs want beside torch: FlashInfer, which needs nvcc when it first runs

bench: install $(STAMPS)/test ## Speed beside this machine's limits and its other servers (LLAMA_CPP=folder VLLM=program ARGS=...)
	$(BIN)/python benchmark/bench.py $(if $(LLAMA_CPP),--llama-cpp $(LLAMA_CPP)) $(if $(VLLM),--vllm $(VLLM)) $(ARGS)

bench-kernels: install $(STAMPS)/test ## Speed of every kernel beside this machine's limits
	PYTHONPATH=kernels $(BIN)/python -m kvrun_kernels.bench

clean: ## Remove everything that was built, but not the environment
	rm -rf target build dist

# --- what is installed only when its inputs change --------------------------------------------------------------------

$(STAMPS)/venv:
	@mkdir -p $(STAMPS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) uv
	@touch $@

# The two packages are on the path as they lie, so an edit is live.
$(STAMPS)/python: $(STAMPS)/venv $(CONSTRAINTS) third_party/python-server.in
	$(UV) install --quiet --python $(BIN)/python --constraint $(CONSTRAINTS) --requirement third_party/python-server.in
	@printf '%s\n%s\n' "$(CURDIR)/server" "$(CURDIR)/kernels" > "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/kvrun.pth"
	@touch $@

$(STAMPS)/proto: proto/model_shard.proto server/generate_proto.py $(STAMPS)/python
	$(BIN)/python server/generate_proto.py
	@touch $@

$(STAMPS)/test: $(STAMPS)/python third_party/python-test.in
	$(UV) install --quiet --python $(BIN)/python --constraint $(CONSTRAINTS) --requirement third_party/python-test.in
	@touch $@

$(STAMPS)/cuda: $(STAMPS)/python third_party/python-cuda.in
	$(UV) install --quiet --python $(BIN)/python --constraint $(CONSTRAINTS) --requirement third_party/python-cuda.in
	@touch $@

$(STAMPS)/ui: $(STAMPS)/python
	$(UV) install --quiet --python $(BIN)/python --constraint $(CONSTRAINTS) gradio httpx
	@touch $@
