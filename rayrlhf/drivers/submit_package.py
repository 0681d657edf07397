"""What a job takes along: the user's folder, the configuration as resolved, and this library, in one archive."""

from __future__ import annotations

import os
import re
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import rayrlhf
from rayrlhf.config.base import JobConfig
from rayrlhf.config.load import PATH_KEYS
from rayrlhf.errors import InputRefused

__all__ = ["CONFIG_FILE", "named_paths", "shipped_files", "write_archive"]

CONFIG_FILE = ".rayrlhf/config.yaml"
"""Where the configuration lies in the archive."""
LIMIT_PACKED = 99 << 20
"""Of the archive: Ray's dashboard takes no request of more than 100 MiB."""
LIMIT_BYTES = 1 << 30
"""Of the files: what is more would hardly come below the other limit, and isn't packed for minutes to find that out."""
LIMIT_FILES = 50_000
_NEVER = frozenset({".git", ".hg", ".venv", "venv", "node_modules", "__pycache__", ".tox"})
"""Folders that no job needs, wherever they lie; and those which tools keep for themselves (`_CACHES`)."""
_CACHES = re.compile(r"\.[\w-]+_cache|\.hypothesis|.+\.egg-info")
_OUTPUTS = frozenset({"build", "dist", "runs", "wandb"})
"""Folders at the top that hold what was made, not what is worked with."""
_IGNORE_FILES = (".gitignore", ".rayignore")
_DATA_FILES = (".jsonl", ".json", ".parquet", ".csv", ".gguf", ".jinja", ".txt", ".yaml")
_LISTED = 5

Files = dict[PurePosixPath, Path]
"""Where a file lies in the archive, and where it lies here."""


# -- what the configuration names --------------------------------------------------------------------------------


def named_paths(config: JobConfig, root: Path) -> list[Path]:
    """Files and folders below ``root`` that the configuration needs: they travel even where they would be left out.

    Absolute paths and names of the hub are for the cluster to find.

    Raises:
        InputRefused: with every relative path that isn't there, or that doesn't lie below ``root``.
    """
    found, problems = [], []
    for key, value in _path_values(config.model_dump(mode="json")):
        if key == "run_dir" or os.path.isabs(value) or value.startswith("package:"):
            continue
        path = Path(os.path.normpath(root / value))
        if path.exists() and path.is_relative_to(root):
            found.append(path)
        elif path.exists():
            problems.append(
                f"{key}: {value} doesn't lie below {root}, which is what travels; give the absolute path of a folder "
                "that the cluster's machines have, or give the command in a folder above it"
            )
        elif _is_local(value, root):
            problems.append(
                f"{key}: found {value!r}; there is no such file or folder in {root}. What only the cluster's machines "
                "have is named by an absolute path"
            )
    if problems:
        raise InputRefused(problems)
    return found + _modules(config.model_dump(mode="json"), root)


def _path_values(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    """All texts at keys of files and folders, with the key as it is written."""
    if isinstance(value, Mapping):
        for name, part in value.items():
            yield from _path_values(part, (*path, name))
    elif isinstance(value, list):
        for index, part in enumerate(value):
            yield from _path_values(part, (*path, str(index)))
    elif isinstance(value, str) and tuple("0" if part.isdecimal() else part for part in path) in PATH_KEYS:
        yield ".".join(path), value


def _is_local(name: str, root: Path) -> bool:
    """Whether a name can't be one of the hub, which are NAME or OWNER/NAME."""
    first = name.partition("/")[0]
    return name.startswith(".") or name.count("/") > 1 or name.endswith(_DATA_FILES) or (root / first).is_dir()


def _modules(value: Any, root: Path) -> list[Path]:
    """Modules of the user's own folder that rewards are imported from."""
    if isinstance(value, Mapping):
        function = value.get("function")
        here = []
        if isinstance(function, str) and ":" in function:
            module = root / function.partition(":")[0].replace(".", "/")
            here = [path for path in (module.with_suffix(".py"), module) if path.exists()][:1]
        return here + [path for part in value.values() for path in _modules(part, root)]
    if isinstance(value, list):
        return [path for part in value for path in _modules(part, root)]
    return []


# -- which files -------------------------------------------------------------------------------------------------


def shipped_files(root: Path, named: Sequence[Path] = (), leave_out: Sequence[Path] = ()) -> Files:
    """The files that travel: those of ``root`` but for what is ignored, those that are ``named``, and this library's.

    Left out are version control, environments, caches and outputs, ``leave_out``, and what .gitignore and .rayignore of
    any folder name. Links are followed.

    Raises:
        InputRefused: where it is too much, with the largest parts; where another rayrlhf lies in ``root``.
    """
    library = Path(rayrlhf.__file__).parent
    if (root / "rayrlhf" / "__init__.py").exists() and not (root / "rayrlhf").samefile(library):
        raise InputRefused(f"{root / 'rayrlhf'} is not the rayrlhf of this command ({library}); give it elsewhere")
    files = {PurePosixPath("rayrlhf") / name: path for name, path in _below(library, ignore_files=False)}
    skipped = {Path(os.path.abspath(path)) for path in leave_out}
    for name, path in _below(root, ignore_files=True, skipped=skipped):
        files[name] = path
        if len(files) > LIMIT_FILES:
            raise InputRefused(
                f"{root} has more than {LIMIT_FILES} files to send; give the command in the folder of your code, or name "
                "what isn't needed in a .rayignore file there"
            )
    for path in named:
        place = PurePosixPath(path.relative_to(root).as_posix())
        if path.is_file():
            files[place] = path
        else:
            files.update({place / name: file for name, file in _below(path, ignore_files=False)})
    _check_size(root, files)
    return files


def _below(root: Path, *, ignore_files: bool, skipped: set[Path] | None = None) -> Iterator[tuple[PurePosixPath, Path]]:
    """All files of a folder, with their places in it, sorted."""
    rules: list[tuple[Path, Any]] = []
    yield from _walk(root, PurePosixPath(), rules, ignore_files, skipped or set(), (os.path.realpath(root),))


def _walk(
    folder: Path,
    place: PurePosixPath,
    rules: list[tuple[Path, Any]],
    ignore_files: bool,
    skipped: set[Path],
    above: tuple[str, ...],
) -> Iterator[tuple[PurePosixPath, Path]]:
    rules = rules + (_rules_of(folder) if ignore_files else [])
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise InputRefused(f"{folder} can't be read ({error.strerror}); name it in a .rayignore file") from error
    for path in entries:
        is_folder = path.is_dir()
        top = ignore_files and not place.parts
        if path in skipped or is_folder and _is_left_out(path.name, top) or _is_ignored(path, is_folder, rules):
            continue
        if path.is_file() and path.suffix != ".pyc":
            yield place / path.name, path
        elif is_folder and (real := os.path.realpath(path)) not in above:  # a link that leads back up ends here
            yield from _walk(path, place / path.name, rules, ignore_files, skipped, (*above, real))


def _is_left_out(name: str, top: bool) -> bool:
    return name in _NEVER or _CACHES.fullmatch(name) is not None or top and name in _OUTPUTS


def _rules_of(folder: Path) -> list[tuple[Path, Any]]:
    """The patterns of a folder's ignore files, read as Ray reads them."""
    from ray._private.thirdparty.pathspec import PathSpec

    files = [folder / name for name in _IGNORE_FILES if (folder / name).is_file()]
    texts = [file.read_text(encoding="utf-8", errors="replace").splitlines() for file in files]
    return [(folder, PathSpec.from_lines("gitwildmatch", lines)) for lines in texts]


def _is_ignored(path: Path, is_folder: bool, rules: Sequence[tuple[Path, Any]]) -> bool:
    suffix = "/" if is_folder else ""
    return any(spec.match_file(path.relative_to(base).as_posix() + suffix) for base, spec in rules)


def _check_size(root: Path, files: Files) -> None:
    sizes = {place: path.stat().st_size for place, path in files.items()}
    total = sum(sizes.values())
    if total > LIMIT_BYTES:
        raise _too_much(
            f"{root} comes to {_mib(total)} in {len(files)} files, {_mib(LIMIT_BYTES)} can be packed", sizes
        )


def _too_much(what: str, sizes: Mapping[PurePosixPath, int]) -> InputRefused:
    """That it can't be sent, with the largest parts of these sizes."""
    parts: Counter[str] = Counter()
    for place, size in sizes.items():
        parts["/".join(place.parts[:3])] += size
    largest = ", ".join(f"{name} ({_mib(size)})" for name, size in parts.most_common(_LISTED))
    return InputRefused(
        f"{what}. The largest parts: {largest}. Models and data belong in a folder that the cluster's machines share, named "
        "by its absolute path; what isn't needed goes into a .rayignore file"
    )


def _mib(size: int) -> str:
    return f"{size / (1 << 20):,.1f} MiB"


# -- the archive -------------------------------------------------------------------------------------------------


def write_archive(target: Path, files: Files, config_text: str) -> int:
    """Write the archive; the same content gives the same bytes, so that Ray knows what it has already.

    Returns:
        Its size in bytes.

    Raises:
        InputRefused: where a file can't be read; where the archive is too large, with the largest parts.
    """
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr(zipfile.ZipInfo(CONFIG_FILE), config_text)
        for place, path in sorted(files.items()):
            if str(place) == CONFIG_FILE:
                continue
            entry = zipfile.ZipInfo(str(place))
            entry.compress_type = zipfile.ZIP_DEFLATED
            try:
                content = path.read_bytes()
            except OSError as error:
                raise InputRefused(f"{path} can't be read ({error.strerror}); name it in a .rayignore file") from error
            archive.writestr(entry, content, compresslevel=1)
        packed = {PurePosixPath(entry.filename): entry.compress_size for entry in archive.infolist()}
    size = target.stat().st_size
    if size > LIMIT_PACKED:
        raise _too_much(
            f"packed it comes to {_mib(size)} in {len(packed)} files, {_mib(LIMIT_PACKED)} can be sent", packed
        )
    return size
