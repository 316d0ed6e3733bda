"""One thread for every test: the same bits everywhere, and no fight for the cores. And a browser
for the tests of pages."""

import pytest
import torch
from browser import browser

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    """A headless Chromium, one for each file of tests."""
    with browser(tmp_path_factory.mktemp("profile")) as chromium:
        yield chromium
