"""The run's log file: what the ``rayrlhf`` logger says, with times."""

from __future__ import annotations

import logging
from pathlib import Path

__all__ = ["close_log", "setup_log"]

_FORMAT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"
_TIME = "%Y-%m-%d %H:%M:%S%z"


class _RunLog(logging.FileHandler):
    """Ours, and recognised as such: another run in the same process replaces it."""


def setup_log(run_dir: Path | str, *, level: int = logging.INFO) -> logging.Logger:
    """Sends the ``rayrlhf`` logger to ``run_dir/log.txt``, behind what stands there already. A second call moves it."""
    close_log()
    path = Path(run_dir) / "log.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = _RunLog(path, mode="a", encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter(_FORMAT, _TIME))
    logger = logging.getLogger("rayrlhf")
    logger.addHandler(handler)
    logger.setLevel(level)
    return logger


def close_log() -> None:
    """Ends the logging into a run's folder. Does nothing where there is none."""
    logger = logging.getLogger("rayrlhf")
    for handler in [handler for handler in logger.handlers if isinstance(handler, _RunLog)]:
        logger.removeHandler(handler)
        handler.close()
