# make format | check | test | docs. They use the tools of the active environment: pip install -e ".[dev]"
.PHONY: format check test docs

format:  ## rewrite the code in the project's style
	ruff check --fix .
	ruff format .

check:  ## style and types
	ruff check .
	ruff format --check .
	mypy vlmslim

test:  ## the test suite without slow tests; TESTS="tests/engine -k anyres" for a part of it
	pytest -n auto $(TESTS)

docs:  ## the documentation as a site, in site/
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict
