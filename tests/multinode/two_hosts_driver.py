"""The driver of `test_two_hosts`: runs on one of the hosts, and prints what it found as a line of JSON.

Arguments: the address of the Ray head, and a folder. In the folder it leaves ``hanging`` when its second start hangs, so that
the test takes the other host off the network.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from rayrlhf.cluster.errors import RoleFailed
from rayrlhf.cluster.session import ray_session
from rayrlhf.cluster.start import start_groups
from rayrlhf.config.base import NodeConfig
from tests.cluster.toy_setup import SETTINGS, samples, toy


def main(address: str, folder: Path) -> None:
    found: dict = {}
    named = [NodeConfig(count=2, gpus=1)]
    settings = SETTINGS.model_copy(update={"address": address, "nodes": named})
    with ray_session(settings):
        with start_groups([toy("meeting", 2, "Meeting", gpus=1)], executor="ray", settings=settings) as groups:
            found["machines"] = [groups.placement.machines[s.machine].name for s in groups.placement.of("meeting")]
            found["addresses"] = [info.address for info in groups["meeting"]._members.infos]
            batch = samples([3, 2, 2])
            found["total"] = groups["meeting"].call("add", batch)["total"].tolist()
            found["expected"] = int(batch["tokens"].sum())
        try:
            start_groups(
                [toy("policy", 2, gpus=1, hang_rank=1, mark=str(folder / "hanging"))],
                executor="ray",
                settings=settings,
            )
        except RoleFailed as error:
            found["seconds"] = time.time() - (folder / "cut").stat().st_mtime
            found["error"] = str(error)
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
