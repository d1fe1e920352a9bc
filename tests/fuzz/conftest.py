"""Small problems, and many: threads would only wait for each other."""

import os

import pytest


@pytest.fixture(autouse=True)
def few_threads(threads):
    threads(4 if os.environ.get("DPO_KERNELS_SANITIZER") == "thread" else 1)
