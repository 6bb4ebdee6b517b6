"""Every promise of RELIABILITY.md names tests that there are."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_promise_has_its_tests():
    rows = re.findall(r"^\| (?!promise |---)(.+?) \| (.+) \|$", (ROOT / "RELIABILITY.md").read_text(), flags=re.M)
    assert len(rows) > 10
    for promise, held_by in rows:
        paths = re.findall(r"`(tests/[^`]+\.py)`", held_by)
        assert paths, promise
        for part in held_by.split(";"):
            (path,) = re.findall(r"`(tests/[^`]+\.py)`", part)
            source = (ROOT / path).read_text()
            for name in re.findall(r"`(test_\w+)`", part):
                assert f"def {name}(" in source, f"{path} has no {name}"
