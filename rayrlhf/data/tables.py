"""Parquet and CSV files, and Hugging Face datasets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayrlhf.data.source import UTF8_BOM, Row, Source, check_utf8

if TYPE_CHECKING:
    import pyarrow

__all__ = ["read_csv", "read_dataset", "read_parquet"]


def read_parquet(source: Source, path: Path, limit: int | None) -> None:
    """Add the rows of a Parquet file to ``source``."""
    import pyarrow
    import pyarrow.parquet

    source.unit = "row"
    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        source.problem(f"it can't be read as Parquet: {_first_line(error)}")
        return
    _add_table(source, table, limit)


def read_csv(source: Source, path: Path, limit: int | None, text_columns: Sequence[str]) -> None:
    """Add the rows of a CSV file with a header to ``source``.

    ``text_columns`` are kept as the strings that stand there (a prompt ``42`` isn't a number); the types of the other
    columns are inferred.
    """
    import pyarrow
    import pyarrow.csv

    raw = path.read_bytes().removeprefix(UTF8_BOM)
    if not raw.strip():
        source.problem("the file is empty")
        return
    texts = [check_utf8(source, line, number) for number, line in enumerate(raw.split(b"\n"), start=1)]
    if None in texts:
        return

    source.unit = "row"  # a record may have several lines
    bad: set[int] = set()

    def bad_row(row: Any) -> str:
        number = row.number - 1  # pyarrow counts the header as row 1
        source.problem(f"it has {row.actual_columns} columns where the header has {row.expected_columns}", number)
        bad.add(number)
        return "skip"

    try:
        table = pyarrow.csv.read_csv(
            pyarrow.BufferReader(raw),
            # one block: a record may be longer than pyarrow's default block
            read_options=pyarrow.csv.ReadOptions(use_threads=False, block_size=min(len(raw) + 1, 2**31 - 1)),
            parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True, invalid_row_handler=bad_row),
            convert_options=pyarrow.csv.ConvertOptions(column_types={c: pyarrow.string() for c in text_columns}),
        )
    except pyarrow.ArrowException as error:
        source.problem(f"it can't be read as CSV: {_first_line(error)}")
        return
    _add_table(source, table, limit, bad)


def _add_table(source: Source, table: pyarrow.Table, limit: int | None, left_out: Collection[int] = ()) -> None:
    """Add the rows of a table, which lacks the rows with the numbers ``left_out``."""
    twice = sorted(name for name, times in Counter(table.column_names).items() if times > 1)
    if twice:
        source.problem(f"the columns {twice} stand there more than once")
        return
    if not table.num_rows and not source.problems:
        source.problem(f"it has the columns {table.column_names}, but no rows")
    rows = table.slice(0, limit).to_pylist()
    numbers = (number for number in count(1) if number not in left_out)
    source.rows += [Row(number, values) for number, values in zip(numbers, rows, strict=False)]


def read_dataset(source: Source, name: str, subset: str | None, split: str, limit: int | None) -> None:
    """Add the rows of a Hugging Face dataset to ``source``: from the Hub, its cache, or a local folder with files."""
    import datasets

    source.unit = "row"
    legal = (
        "Legal: a .jsonl, .json, .parquet or .csv file, a folder with such files, or the name of a dataset on the Hub."
    )
    try:
        dataset = datasets.load_dataset(name, name=subset, split=split)
    # whatever goes wrong in there, in the network, a cache or a data file, means that this data can't be had
    except Exception as error:
        source.problem(f"{_why(source, name, error)} {legal}")
        return
    if not len(dataset):
        source.problem(f"split {split!r} has no rows")
    chosen = dataset if limit is None or limit >= len(dataset) else dataset.select(range(limit))
    source.rows += [Row(number, dict(values)) for number, values in enumerate(chosen, start=1)]


def _why(source: Source, name: str, error: Exception) -> str:
    from datasets.exceptions import DatasetNotFoundError

    detail = f"{type(error).__name__}: {_first_line(error)}"
    if Path(name).is_dir():
        return f"the folder can't be loaded as a dataset ({detail})."
    here = f"there is no file or folder {name!r} ({source.key})"
    if isinstance(error, DatasetNotFoundError):
        return f"{here}, and no dataset of that name on the Hugging Face Hub, or it needs a login ({detail})."
    if isinstance(error, ConnectionError):
        return f"{here}, and the Hugging Face Hub can't be reached to look for a dataset of that name ({detail})."
    return f"{here}, and the Hugging Face dataset of that name can't be loaded ({detail})."


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0].rstrip(".")
