# Tasks for developers and CI. Needs Python 3.11, 3.12 or 3.13 with venv; everything else goes into .venv.

# The Python for .venv; empty: the first suitable one that is found.
PYTHON3 ?=
VENV := .venv
PYTHON := $(VENV)/bin/python
PHOTO ?= data/1.jpg
OUTPUT ?= output
CACHE ?= .compile-cache
PORT ?= 8080
FLAGS ?=
# Parallel test processes, each with one thread: with a thread per core they would slow each other down.
JOBS ?= 2
# The weight set; default: the one in the repository.
WEIGHTS ?= $(or $(CODEFORMER_WEIGHTS),lite)

.DEFAULT_GOAL := help
.PHONY: help predict test lint typecheck format serve demo schema data sheet shots bench soak bulk-soak audit compile-cache clean

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(VENV)/.made:
	@set -- python3.11 python3.12 python3.13 python3; [ -z "$(PYTHON3)" ] || set -- "$(PYTHON3)"; \
	for python in "$$@"; do \
		if "$$python" -c 'import ensurepip, sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
			2>/dev/null; then \
			echo "$(VENV): made with $$("$$python" --version)"; \
			"$$python" -m venv --clear "$(VENV)" && touch "$@"; exit; \
		fi; \
	done; \
	echo "Python 3.11, 3.12 or 3.13 with venv is needed, but none of these commands is one: $$*." >&2; \
	echo "Debian and Ubuntu: sudo apt install python3-venv. Elsewhere: make PYTHON3=/path/to/python3.12" >&2; \
	exit 1

$(VENV)/.runtime: requirements.txt $(VENV)/.made
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/.server: requirements-serve.txt $(VENV)/.runtime
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -r requirements-serve.txt
	@touch $@

$(VENV)/.demo: requirements-demo.txt $(VENV)/.runtime
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -r requirements-demo.txt
	@touch $@

$(VENV)/.tools: requirements-dev.txt $(VENV)/.server $(VENV)/.demo
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

predict: $(VENV)/.runtime  ## Restore PHOTO (default data/1.jpg) into OUTPUT; WEIGHTS=official FLAGS="--fidelity 0.7"
	$(PYTHON) -m codeformer restore "$(PHOTO)" -o "$(OUTPUT)" --weights "$(WEIGHTS)" $(FLAGS)

test: $(VENV)/.tools  ## Run the whole test suite, JOBS files at a time
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n $(JOBS) --dist loadfile

lint: $(VENV)/.tools  ## Check style and formatting
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

typecheck: $(VENV)/.tools  ## Check types, strictly
	$(PYTHON) -m mypy

format: $(VENV)/.tools  ## Format the code
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

serve: $(VENV)/.server  ## Run the real Cog server on PORT (default 8080), without Docker; WEIGHTS=official
	@$(PYTHON) -m scripts.write_schema .cog/openapi_schema.json
	MALLOC_ARENA_MAX=1 COG_MAX_CONCURRENCY=8 PATH="$(CURDIR)/$(VENV)/bin:$$PATH" PORT=$(PORT) CODEFORMER_WEIGHTS="$(WEIGHTS)" \
		COG_PREDICT_TYPE_STUB=predict.py:Predictor \
		$(PYTHON) -m cog.server.http --host 127.0.0.1

demo: $(VENV)/.demo  ## Open a page on PORT (default 8080) to try photos and to compare restorers; WEIGHTS=official
	@MALLOC_ARENA_MAX=1 $(PYTHON) -m codeformer demo --port $(PORT) --weights "$(WEIGHTS)" $(FLAGS)

schema: $(VENV)/.server  ## Update tests/input_schema.json, the pinned input schema
	$(PYTHON) -m scripts.write_schema tests/input_schema.json

data: $(VENV)/.tools  ## Generate the 100 benchmark pictures data/1.jpg ... data/100.jpg
	$(PYTHON) -m data.make_pictures

sheet: $(VENV)/.tools  ## Redraw docs/before_after.jpg and docs/lite.jpg
	$(PYTHON) -m scripts.contact_sheet

shots: $(VENV)/.tools  ## Take docs/page_desktop.jpg and docs/page_phone.jpg again (needs chromium and chromedriver)
	$(PYTHON) -m scripts.page_shots

bench: $(VENV)/.tools  ## Measure profiles on the 100 pictures of data/, and stages; write output/benchmark_report.html
	$(PYTHON) -m benchmarks requests --weights "$(WEIGHTS)"
	$(PYTHON) -m benchmarks stages --weights "$(WEIGHTS)"
	$(PYTHON) -m benchmarks report benchmarks/last_bench.json benchmarks/last_bench_stages.json

soak: $(VENV)/.tools  ## Send 1000 mixed requests to the real server; check memory, files and errors
	$(PYTHON) -m benchmarks soak --weights "$(WEIGHTS)"

bulk-soak: $(VENV)/.tools  ## Bulk runs on two Ray nodes with faults, and what they cost around the engine
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest tests/bulk_soak.py
	$(PYTHON) -m tests.bulk_cost

audit: $(VENV)/.tools  ## Check the installed packages for known vulnerabilities (needs the network)
	$(PYTHON) -m pip_audit --local --strict

compile-cache: $(VENV)/.runtime  ## Compile ahead of time for compile_backend inductor, into CACHE
	$(PYTHON) -m codeformer compile "$(CACHE)" --weights "$(WEIGHTS)"

clean:  ## Remove the environment and caches
	rm -rf $(VENV) .venv-3.* .mypy_cache .pytest_cache .ruff_cache
