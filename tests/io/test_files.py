"""Files that are complete or absent."""

import os
import re
import time

import pytest

from vlmslim.io.files import ABANDONED, atomically, write_atomically


def test_the_mask_of_permissions_is_respected(tmp_path):
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "x.json", "new")
    finally:
        os.umask(before)
    assert (tmp_path / "x.json").stat().st_mode & 0o777 == 0o640


def test_temporary_files_have_names_that_nobody_guesses(tmp_path):
    seen = set()
    for _ in range(3):
        with pytest.raises(OSError, match="full"), atomically(tmp_path / "x.json") as part:
            seen.add(part.name)
            raise OSError("full")
    assert len(seen) == 3 and all(re.fullmatch(r"\.x\.json\.\w{8}\.part", name) for name in seen)
    assert not [*tmp_path.iterdir()]


def test_the_next_write_deletes_what_a_crash_left_and_nothing_that_is_in_use(tmp_path):
    for name in (".x.json.abandond.part", ".x.json.in-use00.part", ".y.json.abandond.part"):
        (tmp_path / name).write_text("half")
        if "abandond" in name:
            os.utime(tmp_path / name, (0, time.time() - ABANDONED - 1))
    write_atomically(tmp_path / "x.json", "new")
    assert {path.name for path in tmp_path.iterdir()} == {"x.json", ".x.json.in-use00.part", ".y.json.abandond.part"}
