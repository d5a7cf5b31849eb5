# make demo    the whole method, small, on this machine; its report: runs/demo/report.html
# make test    everything CI runs
# make setup   only the environment, in .venv (the commands are in .venv/bin)
# make export  after editing a notebook: write the modules, clean the notebooks
# make readme  after editing nbs/index.ipynb: write README.md
# make docs    the documentation site, in docs/_build/html; no request leaves its pages
# make clean   remove the environment and everything that can be made again; runs/ is kept
#
# Needs Python 3.11 or newer and git. PyTorch is installed without CUDA; with it:
#   make setup TORCH_INDEX=https://download.pytorch.org/whl/cu130

PYTHON ?= python3
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
BIN := .venv/bin
GL_PACKAGES := libegl1 libegl-mesa0 libgl1-mesa-dri
# what the simulator draws with: a name for each library that can be loaded
GL_FOUND = $(PYTHON) -c "import ctypes.util as u; print(*(n for n in ('OSMesa', 'EGL') if u.find_library(n)))"

.PHONY: demo setup gl web test docs export readme clean
.DELETE_ON_ERROR:

demo: setup
	$(BIN)/wmpo-demo --resume

setup: gl .venv/installed

.venv/installed: settings.ini constraints.txt setup.py pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
		{ echo "Python 3.11 or newer is needed: make setup PYTHON=/path/to/python3"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-deps --retries 1 --timeout 15 --extra-index-url $(TORCH_INDEX) -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -e ".[dev,docs]" -c constraints.txt
	touch $@

# Drawing without a screen needs Mesa. Root on Debian or Ubuntu gets it; others are told what to install.
gl:
	@if [ "$$(uname)" = Linux ] && [ "$$($(GL_FOUND))" != "OSMesa EGL" ]; then \
		if [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
			export DEBIAN_FRONTEND=noninteractive; \
			apt-get install -qq -y $(GL_PACKAGES) > /dev/null 2>&1 || \
				{ apt-get update -qq && apt-get install -qq -y $(GL_PACKAGES) > /dev/null; }; \
			apt-get install -qq -y libosmesa6 > /dev/null || true; \
		else \
			echo "For drawing without a screen install Mesa: sudo apt-get install $(GL_PACKAGES) libosmesa6"; \
		fi; \
		[ -n "$$($(GL_FOUND))" ] || { echo "Neither libOSMesa nor libEGL can be loaded."; exit 1; }; \
	fi

# The site's build fetches two JavaScript libraries with npm, its tests look at it in a browser. As above; without them the
# build says what is missing and the tests of the browser are skipped.
web:
	@packages=""; browser=""; \
	for name in chromium chromium-browser google-chrome; do command -v $$name > /dev/null && browser=$$name; done; \
	command -v npm > /dev/null || packages="npm"; \
	[ -n "$$browser" ] || packages="$$packages chromium"; \
	if [ -z "$$packages" ]; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
		export DEBIAN_FRONTEND=noninteractive; \
		apt-get install -qq -y --no-install-recommends $$packages > /dev/null 2>&1 || \
			{ apt-get update -qq && apt-get install -qq -y --no-install-recommends $$packages > /dev/null; }; \
	else \
		echo "For the documentation site and its tests install: $$packages"; \
	fi

# one thread per process: steadier on a busy machine than two; test files and notebooks run two at a time
test: export OMP_NUM_THREADS = 1
test: setup web
	$(BIN)/ruff check
	$(BIN)/pytest -q -n 2 --dist loadfile
	$(BIN)/nbdev-test --n-workers 2

docs: setup web
	OMP_NUM_THREADS=1 $(BIN)/python docs/build.py

export: setup
	$(BIN)/nbdev-export
	$(BIN)/nbdev-clean

readme: setup
	$(BIN)/python readme.py > README.md.tmp
	mv README.md.tmp README.md

clean:
	rm -rf .venv build docs/_build dist *.egg-info .pytest_cache .ruff_cache README.md.tmp
	find wmpo_nb tests nbs -name __pycache__ -prune -exec rm -rf {} +
	find nbs -name .ipynb_checkpoints -prune -exec rm -rf {} +
