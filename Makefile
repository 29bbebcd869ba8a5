# make demo: sets up the environment and draws pictures; make test: sets up the environment and runs the tests.

PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
OUT ?= outputs/demo
# How many processes run the tests, best one a core. Their threads, which wait for each other, must not burn a core.
JOBS ?= 2
PYTEST = OMP_WAIT_POLICY=PASSIVE $(RUN) -m pytest -n $(JOBS) --dist loadfile

.PHONY: demo serve test test-isa fast fuzz torture lint train bench clean

demo: $(VENV)/ready
	$(RUN) scripts/txt2img.py --outdir $(OUT) --n_iter 1 --n_samples 4 --n_rows 4 \
		--config configs/shapes/txt2img.yaml --from-file configs/shapes/demo_prompts.txt

# A page to draw on, at http://127.0.0.1:7860.
serve: $(VENV)/web
	$(RUN) scripts/serve.py

test: $(VENV)/web
	$(PYTEST)

# The tests of the integer engine as on older CPUs, one run each, with the tiles of AMX emulated, and without a C
# compiler.
ISAS ?= ALL AVX2 AVX2_VNNI AVX512_CORE AVX512_CORE_VNNI EMULATED_TILES NO_COMPILER
TILES = -mamx-tile -mamx-int8 -mamx-bf16 -include $(CURDIR)/tests/qdiff/engine/emulated_tiles.h
test-isa: $(VENV)/ready
	@set -e; for isa in $(ISAS); do echo "== $$isa"; case $$isa in \
		EMULATED_TILES) CC="cc $(TILES)" $(PYTEST) tests/qdiff/engine;; \
		NO_COMPILER) CC=/bin/false $(PYTEST) tests/qdiff/engine;; \
		*) ONEDNN_MAX_CPU_ISA=$$isa $(PYTEST) tests/qdiff/engine;; \
	esac; done

# The tests that take less than 3 seconds each, for use between two edits.
fast: $(VENV)/web
	$(PYTEST) -m "not slow"

# Thousands of damaged files before each loader; commands killed, stopped and left without room. Minutes to hours.
fuzz: $(VENV)/ready
	$(RUN) tests/fuzz/run.py

torture: $(VENV)/ready
	$(RUN) tests/torture/run.py

lint: $(VENV)/web
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pyright --pythonpath $(RUN)

bench: $(VENV)/ready
	$(RUN) scripts/benchmark.py --outdir outputs/benchmark

# Hours, and days of them on a CPU; each part goes on from its last checkpoint.
train: $(VENV)/ready
	@set -e; for part in reader autoencoder clip txt2img textures tiny; do \
		$(RUN) scripts/train.py --config configs/shapes/$$part.yaml; done

# The marker is written last, so that an interrupted installation is begun again.
$(VENV)/ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "$(PYTHON) is older than 3.11: name a newer one, as in make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

# What the server needs as well, and the tests and type checks of it; drawing does without.
$(VENV)/web: $(VENV)/ready requirements-web.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-web.txt
	touch $@

clean:
	rm -rf $(VENV) outputs
