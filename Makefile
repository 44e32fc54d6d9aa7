# The tasks of people and CI alike. Needs Python 3.11 with venv; everything else goes into .venv.

PYTHON3 ?= $(shell command -v python3.11 || echo python3)
VENV := .venv
PYTHON := $(VENV)/bin/python
PHOTO ?= data/1.jpg
OUTPUT ?= output
CACHE ?= .compile-cache
PORT ?= 8080
FLAGS ?=
# Test processes at a time, each with one thread: two with a thread for every core stand in each other's way.
JOBS ?= 2
# The set of weights: the one that is in the repository, unless told otherwise.
WEIGHTS ?= $(or $(CODEFORMER_WEIGHTS),lite)

.DEFAULT_GOAL := help
.PHONY: help predict test lint typecheck format serve schema data sheet bench soak audit compile-cache clean

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(VENV)/.made:
	@"$(PYTHON3)" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' \
		|| { echo "Python 3.11 is needed; name it: make PYTHON3=/path/to/python3.11"; exit 1; }
	"$(PYTHON3)" -m venv --clear $(VENV)
	@touch $@

$(VENV)/.runtime: requirements.txt $(VENV)/.made
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/.tools: requirements-dev.txt $(VENV)/.runtime
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

serve: $(VENV)/.runtime  ## Run the real Cog server on PORT (default 8080), without Docker; WEIGHTS=official
	@$(PYTHON) -m scripts.write_schema .cog/openapi_schema.json
	MALLOC_ARENA_MAX=1 PATH="$(CURDIR)/$(VENV)/bin:$$PATH" PORT=$(PORT) CODEFORMER_WEIGHTS="$(WEIGHTS)" \
		COG_PREDICT_TYPE_STUB=predict.py:Predictor \
		$(PYTHON) -m cog.server.http --host 127.0.0.1

schema: $(VENV)/.runtime  ## Pin the predictor's input schema anew
	$(PYTHON) -m scripts.write_schema tests/input_schema.json

data: $(VENV)/.tools  ## Make the 100 benchmark pictures data/1.jpg ... data/100.jpg
	$(PYTHON) -m data.make_pictures

sheet: $(VENV)/.tools  ## Draw docs/lite.jpg anew
	$(PYTHON) -m scripts.contact_sheet

bench: $(VENV)/.tools  ## Measure profiles on the 100 pictures of data/, and stages; write output/benchmark_report.html
	$(PYTHON) -m benchmarks requests --weights "$(WEIGHTS)"
	$(PYTHON) -m benchmarks stages --weights "$(WEIGHTS)"
	$(PYTHON) -m benchmarks report benchmarks/last_bench.json benchmarks/last_bench_stages.json

soak: $(VENV)/.tools  ## Send 1000 mixed requests to the real server; memory, files and errors must stay as they should
	$(PYTHON) -m benchmarks soak --weights "$(WEIGHTS)"

audit: $(VENV)/.tools  ## Look the installed packages up in the database of known vulnerabilities (needs the network)
	$(PYTHON) -m pip_audit --local --strict

compile-cache: $(VENV)/.runtime  ## Compile for compile_backend inductor ahead of time, into CACHE
	$(PYTHON) -m codeformer compile "$(CACHE)" --weights "$(WEIGHTS)"

clean:  ## Remove the environment and caches
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache
