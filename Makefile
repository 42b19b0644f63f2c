.PHONY: check
check:  ## style, types and tests, in the environment that is active
	ruff check .
	ruff check --preview --select PLW1514 src tests  # text is UTF-8 on every system
	ruff format --check .
	pyright
	pytest
