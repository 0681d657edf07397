"""Which reader reads what."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path

from rayrlhf.data.json_files import read_json, read_jsonl
from rayrlhf.data.source import Place, Source
from rayrlhf.data.tables import read_csv, read_dataset, read_parquet

__all__ = ["check_kinds", "read_source"]

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def check_kinds(section: str, split: str, subset: str | None, names: Sequence[str]) -> list[str]:
    """Problems of keys in ``section`` of the configuration that say nothing for the kinds of sources named."""
    if not all(_is_file_name(name) for name in names):
        return []
    given = {f"{section}.split": split if split != "train" else None, f"{section}.subset": subset}
    return [
        f"{key} = {value!r} is for Hugging Face datasets, and {names[0]!r} is a file: leave it out"
        for key, value in given.items()
        if value is not None
    ]


def read_source(place: Place, text_columns: Sequence[str]) -> Source:
    """Read a file or dataset.

    Nothing is raised for bad data: the source has its problems. ``text_columns`` hold text, whatever it looks like.
    """
    name, key = place.name, place.key
    source = Source(name, key)
    path = Path(name).expanduser()
    try:
        if path.is_dir() and path.suffix not in SUFFIXES:
            read_dataset(source, str(path), place.subset, place.split, place.limit)
        elif path.is_dir():
            source.problem(f"this is a folder, not a {path.suffix} file ({key})")
        elif path.is_file():
            _read_file(source, path, text_columns, place.limit)
        elif path.exists():
            source.problem(f"this is neither a file nor a folder ({key})")
        elif _is_file_name(name) or not _HUB_NAME.fullmatch(name):
            source.problem(_missing(path, key))
        else:
            read_dataset(source, name, place.subset, place.split, place.limit)
    except OSError as error:
        source.problem(f"it can't be read: {error.strerror or error} ({key})")
    return source


def _is_file_name(name: str) -> bool:
    return Path(name).suffix in SUFFIXES or Path(name).expanduser().is_file()


def _read_file(source: Source, path: Path, text_columns: Sequence[str], limit: int | None) -> None:
    if path.suffix == ".jsonl":
        read_jsonl(source, path, limit)
    elif path.suffix == ".json":
        read_json(source, path, limit)
    elif path.suffix == ".parquet":
        read_parquet(source, path, limit)
    elif path.suffix == ".csv":
        read_csv(source, path, limit, text_columns)
    else:
        source.problem(f"the kind of file is unknown; legal are {', '.join(SUFFIXES)} ({source.key})")


def _missing(path: Path, key: str) -> str:
    if not path.parent.is_dir():
        return f"there is no such file, nor the folder {str(path.parent)!r} ({key})"
    others = [other.name for other in path.parent.iterdir() if other.suffix in SUFFIXES]
    close = difflib.get_close_matches(path.name, others, n=1)
    return f"there is no such file ({key})" + (f"; the nearest is {str(path.parent / close[0])!r}" if close else "")
