"""Where the dimensions of a model come from: its folder, the local hub cache, a catalogue, or the hub."""

from __future__ import annotations

import importlib.util
import json
import os
import queue
import threading
import urllib.error
import urllib.request
from functools import lru_cache
from http.client import HTTPException
from importlib import resources
from pathlib import Path
from typing import Any

from rayrlhf.planning.gguf import gguf_config
from rayrlhf.planning.shapes import FAMILIES, Shape, UnknownFamilyError

__all__ = ["HubAwayError", "NoSuchFolderError", "NotKnownError", "NotThereError", "shape_of"]

HUB_TIMEOUT_S = 2.0


class NotThereError(Exception):
    """There is no such model: a run would be refused. The message says what is missing."""


class NoSuchFolderError(NotThereError):
    """There is no such folder: a run would be refused now, but an earlier one may still make it."""


class NotKnownError(Exception):
    """There may be such a model, but nothing is known of its dimensions. The message says why."""


class HubAwayError(NotKnownError):
    """The hub doesn't answer: there is no use in asking it for other models."""


@lru_cache(maxsize=32)
def shape_of(path: str, *, online: bool = True) -> Shape:
    """The dimensions of a model, as configurations name it.

    Looked for in this order: a folder's config.json (or a .gguf file's header), the local Hugging Face cache, the catalogue of
    public models, the hub itself (unless HF_HUB_OFFLINE is set).

    Args:
        path: a folder, a hub name, a .gguf file or ``package:NAME``.
        online: whether the hub may be asked.

    Raises:
        NotThereError: where there is no such model.
        NotKnownError: where its dimensions can't be had; `HubAwayError` where that is because the hub doesn't answer.
    """
    config, source = _config_of(path, online)
    try:
        return Shape.of(config, source)
    except UnknownFamilyError as error:
        known = ", ".join(FAMILIES)
        raise NotKnownError(
            f"{path} is of the architecture {error}, whose parameters aren't known here ({known} are)"
        ) from None
    except KeyError as error:
        raise NotKnownError(f"{path}: {source} doesn't say {error}") from None


def _config_of(path: str, online: bool) -> tuple[dict[str, Any], str]:
    if path.startswith("package:") or path.endswith(".gguf"):
        return _of_gguf(path)
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise NotThereError(f"{path}: this folder has no config.json, so it is no Hugging Face model")
        return _read(folder / "config.json"), f"{folder}/config.json"
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise NoSuchFolderError(f"model {path!r} can't be read: there is no such folder")
    cached = _in_cache(path)
    if cached is not None:
        return _read(cached), "the local Hugging Face cache"
    listed = _catalogue().get(path.lower())
    if listed is not None:
        return listed, "the catalogue of public models"
    if not online:
        raise NotKnownError(f"{path}: it is in no folder, cache or catalogue")
    return _from_hub(path), "the Hugging Face hub"


def _of_gguf(path: str) -> tuple[dict[str, Any], str]:
    file = Path(path).expanduser()
    if path.startswith("package:"):
        name = path.removeprefix("package:")
        try:
            spec = importlib.util.find_spec(name)
        except (ImportError, ValueError):
            spec = None
        if spec is None or not spec.submodule_search_locations:
            raise NotThereError(f"package:{name}: no Python package {name!r} is installed")
        found = sorted(Path(next(iter(spec.submodule_search_locations))).rglob("*.gguf"))
        if len(found) != 1:
            raise NotThereError(f"package:{name}: the package ships {len(found)} .gguf files, exactly one is needed")
        file = found[0]
    if not file.is_file():
        raise NotThereError(f"{path}: there is no such file")
    try:
        return gguf_config(file), f"the header of {file.name}"
    except (ValueError, KeyError) as error:
        raise NotKnownError(f"{path}: memory isn't planned for it: {error}") from None


def _read(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise NotThereError(f"{file} can't be read: {error}") from None
    if not isinstance(config, dict):
        raise NotThereError(f"{file} can't be read: it holds no JSON object")
    return config


def _in_cache(name: str) -> Path | None:
    """The config.json of the newest snapshot in the local cache, laid out as huggingface_hub does."""
    home = os.environ.get("HF_HOME", "~/.cache/huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE", f"{home}/hub")).expanduser()
    model = cache / f"models--{name.replace('/', '--')}"
    main = model / "refs" / "main"
    if not main.is_file():
        return None
    file = model / "snapshots" / main.read_text().strip() / "config.json"
    return file if file.is_file() else None


@lru_cache(maxsize=1)
def _catalogue() -> dict[str, dict[str, Any]]:
    """The dimensions of public models by their hub name in small letters."""
    found: dict[str, dict[str, Any]] = {}
    for file in sorted((resources.files("rayrlhf.planning") / "catalogue").iterdir(), key=lambda file: file.name):
        for entry in json.loads(file.read_text(encoding="utf-8")):
            found |= {name.lower(): entry["config"] for name in entry["names"]}
    return found


def _from_hub(name: str) -> dict[str, Any]:
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() not in ("", "0", "false", "no", "off"):
        raise NotKnownError(
            f"{name}: it is in no folder, cache or catalogue, and HF_HUB_OFFLINE keeps from asking the hub"
        )
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    request = urllib.request.Request(f"{endpoint}/{name}/resolve/main/config.json")
    if "HF_TOKEN" in os.environ:
        request.add_header("Authorization", f"Bearer {os.environ['HF_TOKEN']}")
    try:
        config = json.loads(_answer(request))
    except urllib.error.HTTPError as error:
        if error.code == 404:
            raise NotThereError(f"model {name!r} can't be read: {endpoint} has no config.json of that name") from None
        raise NotKnownError(f"{name}: {endpoint} answered {error.code} {error.reason}") from None
    except (OSError, HTTPException, ValueError) as error:
        raise HubAwayError(f"{name}: {endpoint} can't be asked for its dimensions: {error}") from None
    return config


def _answer(request: urllib.request.Request) -> bytes:
    """What the hub answers, in time: looking its name up has no deadline of its own, and neither has a slow answer."""
    answers: queue.Queue[bytes | Exception] = queue.Queue()

    def work() -> None:
        try:
            with urllib.request.urlopen(request, timeout=HUB_TIMEOUT_S) as response:
                answers.put(response.read())
        except Exception as error:
            answers.put(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        answer = answers.get(timeout=HUB_TIMEOUT_S)
    except queue.Empty:
        raise TimeoutError(f"no answer within {HUB_TIMEOUT_S:g} s") from None
    if isinstance(answer, Exception):
        raise answer
    return answer
