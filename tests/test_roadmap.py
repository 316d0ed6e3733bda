"""The roadmap's own claims: every block of code on the page prints what the page says."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "COURSE_ROADMAP.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```\n+```text\n(.*?)```", PAGE, flags=re.DOTALL)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")


def agrees(printed, claimed):
    """Equal words, numbers within 5 % (after `about`, 40 %, for what a short training gave; after
    `in this run`, a factor 3, for what it gave by chance); rounding errors, printed as 3e-08,
    within a factor 30."""
    if NUMBER.sub("#", printed) != NUMBER.sub("#", claimed):
        return False
    share, least = (0.4, 0.03) if "about" in claimed else (0.05, 2e-3)
    for one, other in zip(NUMBER.findall(printed), NUMBER.findall(claimed), strict=True):
        if "in this run" in claimed and 1 / 3 <= float(one) / (float(other) or math.nan) <= 3:
            continue
        difference = abs(float(one) - float(other))
        rounding_error = "e-" in other
        allowed = 30 * float(other) if rounding_error else share * abs(float(other)) + least
        if difference > allowed:
            return False
    return True


def test_the_comparison_itself_can_fail():
    assert agrees("loss 1.234, error 2e-08", "loss 1.230, error 3e-08")
    assert not agrees("loss 1.434, error 2e-08", "loss 1.230, error 3e-08")
    assert not agrees("loss 1.230, error 2e-06", "loss 1.230, error 3e-08")
    assert not agrees("gain 1.230", "loss 1.230")
    assert agrees("about 0.30", "about 0.23") and not agrees("about 0.14", "about 0.35")
    assert agrees("in this run 3: True", "in this run 8: True")
    assert not agrees("in this run 3: True", "in this run 3: False")
    assert not agrees("in this run 2", "in this run 8")
    assert not agrees("in this run -3", "in this run 3")
    assert agrees("in this run 0", "in this run 0") and not agrees("in this run 1", "in this run 0")


def test_every_chapter_has_a_block_to_run():
    chapters = re.split(r"^## \d+ · ", PAGE, flags=re.MULTILINE)[1:]
    assert all("```python" in chapter and "```text" in chapter for chapter in chapters)


@pytest.mark.slow
@pytest.mark.parametrize("code, claimed", BLOCKS, ids=range(len(BLOCKS)))
def test_a_block_prints_what_the_page_says(code, claimed, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=400,
    )
    assert run.returncode == 0, run.stderr
    printed = run.stdout.splitlines()
    assert len(printed) == len(claimed.splitlines()), run.stdout
    for line, expected in zip(printed, claimed.splitlines(), strict=True):
        assert agrees(line, expected), f"printed: {line}\nclaimed: {expected}"
