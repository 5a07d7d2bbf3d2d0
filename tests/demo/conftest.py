import pytest

from vlmslim.demo.questions import Questions, examples
from vlmslim.loading import load


@pytest.fixture(scope="module")
def questions() -> Questions:
    return Questions(*load("bundled/tiny-llava", dtype="float32", device="cpu"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[tuple[str, str]]:
    """Files of bundled pictures, and questions about them."""
    folder, found = tmp_path_factory.mktemp("pictures"), []
    for i, example in enumerate(examples()):
        example.picture.save(folder / f"{i}.png")
        found.append((str(folder / f"{i}.png"), example.question))
    return found
