.PHONY: check test-slow docs docs-serve api
check:  ## style, types and tests, in the environment that is active
	ruff check .
	ruff check --preview --select PLW1514 src tests  # text is UTF-8 on every system
	ruff format --check .
	pyright
	pytest

test-slow:  ## the long tests: kills by the dozen, compile, browser, processes
	pytest -m slow

docs:  ## the site, into build/site (extra: docs)
	mkdocs build --strict

docs-serve:  ## the site while it is written
	mkdocs serve

api:  ## renew the snapshot of the public names
	python tests/laws/test_public_api.py
