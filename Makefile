.PHONY: check
check:  ## style, types and tests, in the environment that is active
	ruff check .
	ruff format --check .
	pyright
	pytest
