"""A cluster's dashboard, as `rayrlhf submit` speaks with it: is it one, does it let us in, and what do its jobs do."""

from __future__ import annotations

import asyncio
import io
import logging
import os
import queue
import re
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar
from urllib.parse import urlsplit

import httpx

from rayrlhf.errors import InputRefused, RunFailed

__all__ = ["Dashboard", "Said", "check_dashboard", "dashboard_url", "find_token"]

T = TypeVar("T")

CONNECT_SECONDS = 4.0
ANSWER_SECONDS = 5.0
CHECK_SECONDS = 9.5
"""For all of the first check together, names that don't resolve included."""
CALL_SECONDS = (10.0, 60.0)
"""Of one request afterwards: to connect, and between two pieces of the answer."""
UPLOAD_SECONDS = (60.0, 300.0)
"""Of the request with the archive: for each 16 KiB of it, and for the dashboard to put it away before it answers."""
SILENCE_SECONDS = 300.0
"""After so long without a word the log is asked for again: a connection that was cut may look like one that is quiet."""
QUIET_SECONDS = 10.0
"""After so long without a word it is looked whether the job goes on: the log of one that has ended is asked for again."""
PAUSE_SECONDS = (0.5, 8.0)
"""Before the log is asked for again, the first time, and at most."""
LOST_SECONDS = 120.0
"""How long a dashboard may be away before the job's log, or a question about it, is given up."""
OLDEST_RAY = (2, 60)
DEFAULT_PORT = 8265
PROXY_STATUS = re.compile(r"\bstatus code 50[234]\b")
"""What a proxy says, in the words of Ray's client, where the dashboard behind it doesn't answer it."""

_TOKEN_FILE = Path(".ray") / "auth_token"


class Said(NamedTuple):
    """A piece of a job's log, or that no more comes: ``end`` with a text is that of a job whose log wasn't read to its end."""

    kind: Literal["text", "end", "lost"]
    text: str = ""


def dashboard_url(address: str) -> str:
    """``http://host:port`` of what a user gives as a cluster's address; without a port it is the dashboard's usual one.

    Raises:
        InputRefused: where that can't be the address of a dashboard.
    """
    given = address.strip()
    if given.startswith("ray://") or given == "auto":
        raise InputRefused(
            f"--address: {given} is where programs join a cluster; jobs go to its dashboard, such as "
            f"http://HEAD:{DEFAULT_PORT}"
        )
    url = given if "://" in given else f"http://{given}"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    if parts.scheme not in ("http", "https") or not parts.hostname or re.search(r"\s", url):
        raise InputRefused(f"--address: {address!r} is no address of a dashboard; legal: http://HEAD:{DEFAULT_PORT}")
    if port is None and parts.scheme == "http" and parts.path in ("", "/"):
        return f"{url.rstrip('/')}:{DEFAULT_PORT}"
    return url.rstrip("/")


def find_token(environment: Mapping[str, str] = os.environ) -> str | None:
    """The token that Ray itself would take: RAY_AUTH_TOKEN, the file of RAY_AUTH_TOKEN_PATH, or ~/.ray/auth_token.

    Raises:
        InputRefused: where RAY_AUTH_TOKEN_PATH names a file that can't be read.
    """
    if environment.get("RAY_AUTH_TOKEN"):
        return environment["RAY_AUTH_TOKEN"].strip()
    named = environment.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named).expanduser() if named else Path(environment.get("HOME", "~")).expanduser() / _TOKEN_FILE
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError) as error:
        if named:
            raise InputRefused(f"RAY_AUTH_TOKEN_PATH: {named} can't be read ({error})") from error
        return None


def check_dashboard(url: str, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Ask whether there is a Ray dashboard, and whether it lets us in; takes at most 10 s.

    The token is sent where the dashboard asks for one, not before.

    Returns:
        The headers that its requests need.

    Raises:
        InputRefused: nobody there, something else there, no token or a wrong one, or a Ray that is too old.
    """
    headers: dict[str, str] = {}
    end = time.monotonic() + CHECK_SECONDS
    answer = _by(end, url, lambda: _ask(url, headers))
    if answer.status_code in (401, 403):
        token = None if environment.get("RAY_AUTH_MODE", "").lower() == "disabled" else find_token(environment)
        if token is None:
            raise InputRefused(
                f"--address: {url} asks for a token, and there is none here: set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH "
                "to a file with it (on the head node `ray get-auth-token` prints it)"
            )
        headers = {"Authorization": f"Bearer {token}"}
        answer = _by(end, url, lambda: _ask(url, headers))
        if answer.status_code in (401, 403):
            raise InputRefused(
                f"--address: {url} doesn't take the token that is here (RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or "
                "~/.ray/auth_token, in this order); on the head node `ray get-auth-token` prints the right one"
            )
    _check_version(url, answer)
    return headers


def _ask(url: str, headers: Mapping[str, str]) -> httpx.Response:
    timeout = httpx.Timeout(ANSWER_SECONDS, connect=CONNECT_SECONDS)
    return httpx.get(f"{url}/api/version", headers=dict(headers), timeout=timeout, follow_redirects=True)


def _by(end: float, url: str, ask: Callable[[], T]) -> T:
    """What ``ask`` returns until then, on the monotonic clock: looking a name up has no deadline of its own."""
    answers: queue.Queue[T | Exception] = queue.Queue()

    def work() -> None:
        try:
            answers.put(ask())
        except Exception as error:
            answers.put(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        answer = answers.get(timeout=max(0.0, end - time.monotonic()))
    except queue.Empty:
        answer = TimeoutError(f"no answer within {CHECK_SECONDS:g} s")
    if isinstance(answer, Exception):
        raise InputRefused(
            f"--address: no dashboard answers at {url} ({str(answer) or type(answer).__name__}). Is Ray up there, with "
            f"--dashboard-host=0.0.0.0, and is port {DEFAULT_PORT} (by default) open from here? Through ssh: "
            f"ssh -L {DEFAULT_PORT}:localhost:{DEFAULT_PORT} HEAD, then --address http://localhost:{DEFAULT_PORT}"
        ) from answer
    return answer


def _check_version(url: str, answer: httpx.Response) -> None:
    try:
        version = str(answer.json()["ray_version"])
    except (ValueError, KeyError, TypeError):
        raise InputRefused(
            f"--address: what answers at {url} is no Ray dashboard (GET /api/version: {answer.status_code} "
            f"{answer.reason_phrase}); its port is {DEFAULT_PORT} by default"
        ) from None
    found = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if found < OLDEST_RAY:
        raise InputRefused(f"--address: Ray {version} runs at {url}; rayrlhf needs {OLDEST_RAY[0]}.{OLDEST_RAY[1]}")


@contextmanager
def _without_addresses() -> Iterator[None]:
    """Ray's client prefers these variables to the address that it is given."""
    names = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


class Dashboard:
    """Jobs of a cluster, after `check_dashboard`. Requests have deadlines; what fails is a `RunFailed` with its cause."""

    def __init__(self, url: str, headers: Mapping[str, str]):
        from ray.job_submission import JobSubmissionClient

        class Client(JobSubmissionClient):
            """With deadlines, which Ray's own requests don't have."""

            def _do_request(self, method: str, endpoint: str, *, data: bytes | None = None, **kwargs: Any) -> Any:
                if data is None:
                    return super()._do_request(method, endpoint, **{"timeout": CALL_SECONDS, **kwargs})
                # Bytes would be sent at once, and all of them within the first of the timeouts, however many they are.
                pieces = io.BytesIO(data)
                return super()._do_request(method, endpoint, **{"timeout": UPLOAD_SECONDS, **kwargs, "data": pieces})

        for name in ("ray.dashboard.modules.job.sdk", "ray.dashboard.modules.dashboard_sdk"):
            logging.getLogger(name).setLevel(logging.ERROR)
        self.url = url
        with _told(url), _without_addresses():
            self._client = Client(url, headers=dict(headers))

    def submit(self, job: str, archive: Path, *, env_vars: Mapping[str, str], setup_hook: str, **more: Any) -> None:
        """Upload an archive, and start a job with it at the head of its import path.

        It doesn't go as Ray's ``working_dir``: that is removed and unpacked again by each further node which has the same
        temporary folder (several nodes on one machine), under the feet of the processes that run in it.

        Args:
            job: its name.
            archive: a zip file.
            env_vars: for the job and its roles.
            setup_hook: function that each worker process calls first.
            more: further arguments of Ray's ``submit_job``.

        Raises:
            RunFailed: where it wasn't accepted, or nobody knows whether it was.
        """
        import requests

        with _told(self.url):
            uri = self._client._upload_package_if_needed(str(archive), include_gitignore=False, is_file=True)
            environment = {"py_modules": [uri], "env_vars": dict(env_vars), "worker_process_setup_hook": setup_hook}
            try:
                self._client.submit_job(runtime_env=environment, submission_id=job, **more)
            except (requests.RequestException, RuntimeError) as error:
                if isinstance(error, RuntimeError) and not PROXY_STATUS.search(str(error)):
                    raise
                if not self._is_known(job):
                    raise RunFailed(
                        f"the dashboard at {self.url} was sent job {job}, and didn't say whether it accepts it "
                        f"({_first_line(error)}); if it did, `rayrlhf submit --follow {job} --address {self.url}` finds it"
                    ) from error

    def _is_known(self, job: str) -> bool:
        """Whether the dashboard says that there is this job."""
        try:
            return self.info(job) is not None
        except (RunFailed, InputRefused):
            return False

    def info(self, job: str) -> Any:
        """What Ray knows of a job.

        Raises:
            InputRefused: where there is no such job.
        """
        with _told(self.url):
            try:
                return self._client.get_job_info(job)
            except RuntimeError as error:
                if "404" in str(error):
                    raise InputRefused(f"there is no job {job} at {self.url}") from error
                raise

    def stop(self, job: str) -> None:
        """Ask a job to end."""
        with _told(self.url):
            self._client.stop_job(job)

    def patiently(self, ask: Callable[[], T]) -> T:
        """What ``ask`` returns, which is called again where a request fails, as long as for a log.

        Raises:
            RunFailed: where it fails to the end.
        """
        end, pause = time.monotonic() + LOST_SECONDS, PAUSE_SECONDS[0]
        while True:
            try:
                return ask()
            except RunFailed:
                if time.monotonic() + pause > end:
                    raise
            time.sleep(pause)
            pause = min(PAUSE_SECONDS[1], 2 * pause)

    def log(self, job: str) -> queue.Queue[Said]:
        """A queue into which a thread puts the job's log from its beginning, as it is written, then its end."""
        said: queue.Queue[Said] = queue.Queue()
        threading.Thread(target=self._read, args=(job, said), daemon=True).start()
        return said

    def _read(self, job: str, said: queue.Queue[Said]) -> None:
        """Read until the job has ended. A log that breaks off is read again, without what was delivered already."""
        delivered, pause, away_since = 0, PAUSE_SECONDS[0], None
        while True:
            begun, before, problem, ended = time.monotonic(), delivered, "", False
            try:
                delivered = asyncio.run(self._tail(job, delivered, said))
            except _Broken as broken:
                delivered, problem = broken.delivered, str(broken)
            try:
                ended = self.info(job).status.is_terminal()
            except (RunFailed, InputRefused) as error:
                problem = str(error)
            if ended and not problem:
                said.put(Said("end"))
                return
            now = time.monotonic()
            # A connection that lasted was one, however quiet it was.
            if not problem or delivered > before or now - begun >= SILENCE_SECONDS:
                away_since = None
            else:
                away_since = away_since or now
                if now - away_since > LOST_SECONDS:
                    unread = Said("end", f"the rest of the log can't be read: {problem}")
                    said.put(unread if ended else Said("lost", problem))
                    return
            time.sleep(pause)
            pause = min(PAUSE_SECONDS[1], 2 * pause) if problem else PAUSE_SECONDS[0]

    async def _tail(self, job: str, delivered: int, said: queue.Queue[Said]) -> int:
        """Deliver what the log says beyond ``delivered`` characters; returns how many it has now.

        Raises:
            _Broken: where the connection breaks off, or stays silent for very long, or when the job has ended.
        """
        pieces, seen = self._client.tail_job_logs(job), 0
        try:
            while True:
                text = await self._next_piece(job, pieces)
                new = text[max(0, delivered - seen) :]
                seen += len(text)
                if new:
                    said.put(Said("text", new))
                    delivered = seen
        except StopAsyncIteration:
            return delivered
        except Exception as error:
            raise _Broken(delivered, error) from error

    async def _next_piece(self, job: str, pieces: AsyncIterator[str]) -> str:
        """The next of a log's pieces.

        Raises:
            StopAsyncIteration: at the end of the log.
            TimeoutError: where none comes, and none is to be expected on this connection.
        """
        coming, begun = asyncio.ensure_future(anext(pieces)), time.monotonic()
        try:
            while not coming.done():
                await asyncio.wait({coming}, timeout=min(QUIET_SECONDS, SILENCE_SECONDS))
                if coming.done():
                    break
                silent = time.monotonic() - begun >= SILENCE_SECONDS
                if silent or await asyncio.to_thread(self._has_ended, job):
                    raise TimeoutError("the log is silent")
            return coming.result()
        finally:
            coming.cancel()

    def _has_ended(self, job: str) -> bool:
        """Whether the job is known to have ended."""
        try:
            return bool(self.info(job).status.is_terminal())
        except (RunFailed, InputRefused):
            return False


class _Broken(Exception):
    """A log that broke off after so many characters."""

    def __init__(self, delivered: int, cause: Exception):
        super().__init__(f"{type(cause).__name__}: {cause}")
        self.delivered = delivered


@contextmanager
def _told(url: str) -> Iterator[None]:
    """Failures of requests as `RunFailed`."""
    import requests
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError as error:
        raise RunFailed(f"the dashboard at {url} doesn't take our token any more: {_first_line(error)}") from error
    except (requests.RequestException, ConnectionError, RuntimeError) as error:
        raise RunFailed(f"the dashboard at {url}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:500]
