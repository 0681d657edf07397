"""A job's log over a connection that breaks off: every character arrives, and none twice."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from ray.job_submission import JobStatus

from rayrlhf.drivers import submit_cluster
from rayrlhf.drivers.submit_cluster import Dashboard, Said
from rayrlhf.errors import RunFailed

TEXT = "".join(f"line {k}\n" for k in range(50))


class Client:
    """Stands in for Ray's client: each connection begins with the log's beginning, and breaks as is said."""

    def __init__(self, connections: list[tuple[int, int, Exception | None]], statuses: list[JobStatus | Exception]):
        self.connections = connections
        """Of each: up to which character it comes, in pieces of which length, and how it ends."""
        self.statuses = statuses

    async def tail_job_logs(self, job: str):
        end, length, error = self.connections.pop(0)
        for start in range(0, end, length):
            yield TEXT[start : min(end, start + length)]
        if error is not None:
            raise error

    def get_job_info(self, job: str):
        status = self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]
        if isinstance(status, Exception):
            raise status
        return SimpleNamespace(status=status)


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(submit_cluster, "PAUSE_SECONDS", (0.05, 0.1))


def read(client: Client) -> list[Said]:
    dashboard = Dashboard.__new__(Dashboard)
    dashboard.url, dashboard._client = "http://head:8265", client
    said = dashboard.log("a-1")
    found = []
    while not found or found[-1].kind == "text":
        found.append(said.get(timeout=60))
    return found


def test_nothing_is_lost_and_nothing_comes_twice():
    broken = RuntimeError("WebSocket connection closed unexpectedly")
    client = Client(
        [(100, 30, broken), (90, 7, broken), (200, 64, OSError("reset")), (200, 50, None), (len(TEXT), 33, None)],
        [JobStatus.RUNNING, JobStatus.RUNNING, JobStatus.SUCCEEDED, JobStatus.RUNNING, JobStatus.SUCCEEDED],
    )
    *pieces, last = read(client)
    assert "".join(piece.text for piece in pieces) == TEXT
    assert last == Said("end") and not client.connections


def test_a_dashboard_that_is_away_for_a_moment_is_asked_again():
    away = RuntimeError("502 Bad Gateway")
    client = Client([(20, 9, away), (len(TEXT), 99, None)], [away, JobStatus.SUCCEEDED])
    *pieces, last = read(client)
    assert "".join(piece.text for piece in pieces) == TEXT and last.kind == "end"


def test_a_dashboard_that_stays_away_is_given_up(monkeypatch):
    monkeypatch.setattr(submit_cluster, "LOST_SECONDS", 0.2)
    away = OSError("no route to host")
    *_, last = read(Client([(10, 5, away)] * 9, [RuntimeError("no route to host")]))
    assert last.kind == "lost" and "http://head:8265: no route to host" in last.text


@pytest.mark.parametrize(("status", "kind"), [(JobStatus.RUNNING, "lost"), (JobStatus.SUCCEEDED, "end")])
def test_a_log_that_can_not_be_read_is_given_up(monkeypatch, status, kind):
    """A proxy that lets requests through and no WebSockets."""
    monkeypatch.setattr(submit_cluster, "LOST_SECONDS", 0.2)
    *pieces, last = read(Client([(0, 1, OSError("invalid upgrade"))] * 9, [status]))
    assert last.kind == kind and "invalid upgrade" in "".join(piece.text for piece in [*pieces, last])


def test_silence_is_looked_into(monkeypatch):
    """A connection that was cut somewhere on its way says nothing: after a while the log is asked for anew."""
    import asyncio

    class Silent(Client):
        async def tail_job_logs(self, job: str):
            if len(self.connections) == 2:
                self.connections.pop(0)
                yield TEXT[:40]
                await asyncio.sleep(3600)
            async for piece in super().tail_job_logs(job):
                yield piece

    monkeypatch.setattr(submit_cluster, "SILENCE_SECONDS", 0.2)
    *pieces, last = read(Silent([(0, 1, None), (len(TEXT), 80, None)], [JobStatus.RUNNING, JobStatus.SUCCEEDED]))
    assert "".join(piece.text for piece in pieces) == TEXT and last.kind == "end"


def test_a_log_that_is_silent_after_the_job_has_ended_is_asked_for_anew(monkeypatch):
    import asyncio

    class Silent(Client):
        async def tail_job_logs(self, job: str):
            if self.connections[0][0] == 0:
                self.connections.pop(0)
                await asyncio.sleep(3600)
            async for piece in super().tail_job_logs(job):
                yield piece

    monkeypatch.setattr(submit_cluster, "QUIET_SECONDS", 0.2)
    client = Silent([(0, 1, None), (len(TEXT), 80, None)], [JobStatus.RUNNING, JobStatus.SUCCEEDED])
    *pieces, last = read(client)
    assert "".join(piece.text for piece in pieces) == TEXT and last.kind == "end" and not client.connections


def test_a_request_that_fails_for_a_moment_is_repeated(monkeypatch):
    dashboard = Dashboard.__new__(Dashboard)
    dashboard.url = "http://head:8265"
    dashboard._client = Client([], [RuntimeError("502 Bad Gateway"), ConnectionError("reset"), JobStatus.SUCCEEDED])
    with pytest.raises(RunFailed, match="502 Bad Gateway"):
        dashboard.info("a-1")
    assert dashboard.patiently(lambda: dashboard.info("a-1")).status == JobStatus.SUCCEEDED
    monkeypatch.setattr(submit_cluster, "LOST_SECONDS", 0.2)
    dashboard._client = Client([], [RuntimeError("502 Bad Gateway")])
    with pytest.raises(RunFailed, match="502 Bad Gateway"):
        dashboard.patiently(lambda: dashboard.info("a-1"))


def test_failures_of_requests_are_one_line():
    dashboard = Dashboard.__new__(Dashboard)
    dashboard.url = "http://head:8265"
    dashboard._client = Client([], [RuntimeError("Request failed with status code 500: boom.\nTraceback ...")])
    with pytest.raises(RunFailed) as failed:
        dashboard.info("a-1")
    assert str(failed.value) == "the dashboard at http://head:8265: Request failed with status code 500: boom."
