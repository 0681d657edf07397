"""Samples go through the driver without its memory growing: of each it holds references, and lets go of them."""

from __future__ import annotations

import gc
import tracemalloc

import psutil
from toy_setup import SETTINGS, toy

from rayrlhf.cluster.start import start_groups
from tests.cluster.traffic import check, one_step

EACH = 400
WARM_UP, STEPS = 5, 30


def test_the_driver_does_not_grow_with_the_samples(local_ray):
    me = psutil.Process()
    with start_groups([toy("standin", 2)], executor="ray", settings=SETTINGS) as groups:
        for step in range(WARM_UP):
            check(EACH, step, one_step(groups["standin"], EACH, step))
        gc.collect()
        tracemalloc.start()
        try:
            before, resident = tracemalloc.get_traced_memory()[0], me.memory_info().rss
            for step in range(WARM_UP, WARM_UP + STEPS):
                check(EACH, step, one_step(groups["standin"], EACH, step))
            gc.collect()
            grown, more = tracemalloc.get_traced_memory()[0] - before, me.memory_info().rss - resident
        finally:
            tracemalloc.stop()
    # 12,000 samples of about 3 tokens; their columns alone have 1.5 MB, and a list that kept one object each would have as much.
    assert grown < 250_000, f"{grown} bytes more after {STEPS * EACH} samples"
    assert more < 40 << 20, f"{more >> 20} MiB more"
