# Two commands from a clone: `make demo` compresses a small trained model and runs it, `make test` runs the tests.
# Both make a virtual environment in .venv from requirements.lock; a C++ compiler is used where there is one.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
SOURCES := $(shell find src -name '*.cpp' -o -name '*.h') CMakeLists.txt pyproject.toml

.PHONY: demo test check format docs bench fuzz torture cluster clean

demo: $(VENV)/installed
	$(RUN) examples/demo.py

test: $(VENV)/installed
	$(RUN) -m pytest -q

check: $(VENV)/installed
	$(VENV)/bin/ruff format --check src tests bench examples docs
	$(VENV)/bin/ruff check src tests bench examples docs
	$(VENV)/bin/pyright --pythonpath $(RUN)
	$(RUN) -m pytest -q -m 'not slow'

format: $(VENV)/installed
	$(VENV)/bin/ruff format src tests bench examples docs
	$(VENV)/bin/ruff check --fix src tests bench examples docs

docs: $(VENV)/installed
	$(RUN) docs/generate.py

bench: $(VENV)/installed
	$(VENV)/bin/halfbit bench --tokens 1,4,16,32 --csv bench/results.csv

# the extension again, with AddressSanitizer and UBSan, in a folder of its own; Python itself is preloaded with their library
FUZZ := build/fuzz
MUTATIONS ?= 20000
SEED ?= 0
CXX ?= g++

fuzz: $(VENV)/installed
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" cmake -S . -B $(FUZZ) -G Ninja -DCMAKE_BUILD_TYPE=Release \
		-DHALFBIT_SANITIZE=ON -DPython_EXECUTABLE="$(CURDIR)/$(RUN)"
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" cmake --build $(FUZZ)
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 $(RUN) tests/fuzz.py --mutations $(MUTATIONS) --seed $(SEED) \
		--extension "$$(echo $(FUZZ)/_C.*.so)"

# runs that are killed, and that find the disk failing or full, at every point
KILLS ?= 100

torture: $(VENV)/installed
	$(RUN) tests/torture.py --kills $(KILLS)
	$(RUN) tests/torture.py --kills $(KILLS) --tune
	$(RUN) tests/torture.py --kills $(KILLS) --model switch
	$(RUN) tests/torture.py --writes 0
	$(RUN) tests/torture.py --full

# the tests with a real Ray cluster, which `make test` leaves out: one of its workers is killed
cluster: $(VENV)/installed
	$(RUN) -m pip install --quiet --disable-pip-version-check "ray>=2.40"
	$(RUN) -m pytest -q tests/test_cluster.py

# without pip's build isolation: the lock file also pins what the extension is built with, CMake included
$(VENV)/installed: requirements.lock $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.lock
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" \
		$(RUN) -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	touch $@

clean:
	rm -rf $(VENV) build dist demo-output
