# make demo   sets everything up, then trains, exports and decodes a sample scene
# make test   sets everything up, then runs the tests
# make lint   formatting, lint and types
# make bench  DATA=folder of a capture [PRESET=configs/lego_100.toml]
# make codecs  sizes and times of the codec
# make profile  where the time of a training step and of a frame goes

PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3.10 python3,$(shell \
	$(p) -c 'import sys, venv; print("$(p)") if (3, 10) <= sys.version_info < (3, 13) else None' 2>/dev/null)))
PRESET ?= configs/lego_100.toml
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test lint bench profile transforms codecs setup clean

demo: $(READY)
	$(BIN)/mwnerf demo

test: $(READY)
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

bench: $(READY)
	@test -n "$(DATA)" || { echo "make bench DATA=folder of a capture (see $(PRESET))"; exit 2; }
	$(BIN)/mwnerf bench $(PRESET) --data $(DATA)

profile: $(READY)
	$(BIN)/mwnerf profile

transforms: $(READY)
	$(BIN)/python -m masked_wavelet_nerf.bench_transform

codecs: $(READY)
	$(BIN)/python -m masked_wavelet_nerf.bench_codec

setup: $(READY)

$(READY): pyproject.toml .ci/system-packages
	@test -n "$(PYTHON)" || { echo "Python 3.10, 3.11 or 3.12 with venv is needed (Debian: apt-get install python3-venv); or name one: make PYTHON=/path/to/python3.11"; exit 2; }
	.ci/system-packages
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --progress-bar on --editable '.[dev]'
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info
