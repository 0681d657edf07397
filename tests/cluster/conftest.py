"""One Ray for all tests of a file: other files need a cluster of several nodes."""

from __future__ import annotations

import os
import sys

import pytest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from toy_setup import SETTINGS  # noqa: E402

from rayrlhf.cluster.session import ray_session  # noqa: E402


@pytest.fixture(scope="module")
def local_ray():
    with ray_session(SETTINGS):
        yield
