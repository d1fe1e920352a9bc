"""Small problems, and many: threads would only wait for each other."""

import pytest


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)
