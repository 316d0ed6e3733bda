"""One thread for every test: the same bits everywhere, and no fight for the cores. No waiting for
the disk. And a browser for the tests of pages."""

import os

import pytest
import torch
from browser import browser

torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def no_waiting_for_the_disk():
    """Files need not outlive a loss of power here, and hundreds are written."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    """A headless Chromium, one for each file of tests."""
    with browser(tmp_path_factory.mktemp("profile")) as chromium:
        yield chromium
