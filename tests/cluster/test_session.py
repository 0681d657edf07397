"""Starting and joining Ray, what lies in its store, and what is said about it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from unittest.mock import Mock, call

import pytest
import ray
import torch
from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError, OutOfMemoryError, RayError
from toy_setup import HERE

from rayrlhf.cluster import columns, ray_end, ray_pending, session
from rayrlhf.cluster.nodes import ASK_SECONDS, Node, NodeWatch, unanswering
from rayrlhf.cluster.ray_logs import cause_of_death, read_tail
from rayrlhf.cluster.ray_process import interface_of
from rayrlhf.cluster.session import check_address, is_private, ray_session, resolve_address
from rayrlhf.config.base import ClusterConfig, NodeConfig
from rayrlhf.errors import InputRefused, RunFailed
from tests.support.ports import deaf_port

DRIVER = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import ray
from toy_setup import *
from rayrlhf.cluster.errors import RoleFailed
from rayrlhf.cluster.session import is_private, ray_session
from rayrlhf.cluster.start import start_groups
ours = SETTINGS.model_copy(update={"address": sys.argv[2]})
with ray_session(ours), start_groups([toy("guest")], executor="ray", settings=ours) as groups:
    assert ray.get_runtime_context().gcs_address == sys.argv[2] and not is_private()
    os.kill(groups["guest"].pids[0], signal.SIGKILL)
    try:
        groups["guest"].broadcast("ping")
    except RoleFailed as error:
        print("told:", str(error).split(":")[0])
assert not ray.is_initialized()
with ray_session(SETTINGS):
    node = ray._private.worker._global_node
    folder = node.get_session_dir_path()
    assert is_private() and ray.get_runtime_context().gcs_address != sys.argv[2] and os.path.isdir(folder)
    assert len(node.plasma_store_socket_name) < 100
assert not os.path.exists(folder) and not is_private()
print("done")
"""


def test_a_second_process_joins_and_leaves_and_has_a_ray_of_its_own(local_ray):
    address = ray.get_runtime_context().gcs_address
    asked = subprocess.run(
        [sys.executable, "-c", DRIVER, HERE, address],
        capture_output=True,
        text=True,
        cwd=os.path.dirname(os.path.dirname(HERE)),
        timeout=200,
    )
    assert asked.returncode == 0, asked.stderr
    # nothing of Ray's own on the terminal, though one of its workers was killed
    assert asked.stdout.splitlines() == ["told: guest rank 0 died in ping", "done"]
    assert asked.stderr == ""
    assert ray.get(ray.put(3)) == 3  # ours is still there


def test_an_initialised_ray_is_used_and_left(local_ray):
    assert is_private()
    with ray_session(ClusterConfig(address="nowhere:1")):
        assert is_private()
    assert ray.is_initialized()


def test_a_ray_that_does_not_come_up_is_a_failed_run_with_its_logs(monkeypatch):
    def slow(**_: object) -> None:
        raise Exception("The current node timed out during startup.")  # as Ray says it

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray, "init", slow)
    said = r"Ray did not come up on this machine: .*timed out.* Its logs: /"
    with pytest.raises(RunFailed, match=said) as told, ray_session(ClusterConfig()):
        raise AssertionError("not reached")
    assert not is_private()
    folder = str(told.value).rpartition("Its logs: ")[2]
    assert os.path.isdir(folder)
    os.rmdir(folder)


@pytest.mark.parametrize(("ends", "kept"), [(InputRefused("no such module"), False), (RunFailed("it died"), True)])
def test_the_files_of_a_ray_of_its_own_outlast_a_failure_and_not_a_refusal(monkeypatch, tmp_path, ends, kept):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    for name in ("init", "shutdown"):
        monkeypatch.setattr(ray, name, lambda **_: None)
    folder = tmp_path / "files"
    monkeypatch.setattr(session, "_short_folder", lambda: folder.mkdir() or str(folder))
    with pytest.raises(type(ends)), ray_session(ClusterConfig()):
        raise ends
    assert folder.is_dir() is kept


def test_unreachable_address_is_refused_soon(monkeypatch):
    begin = time.monotonic()
    with (
        deaf_port() as port,
        pytest.raises(InputRefused, match=f"cluster.address: nothing answers at 127.0.0.1:{port}"),
    ):
        check_address(f"127.0.0.1:{port}")
    assert time.monotonic() - begin < 30
    monkeypatch.setattr(session, "HEALTH_SECONDS", 4.0)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(InputRefused, match="does not answer as a Ray head node does .no answer within 4 s"):
            check_address(f"127.0.0.1:{silent.getsockname()[1]}")
    assert time.monotonic() - begin < 60


def test_addresses(tmp_path):
    assert resolve_address("head:6379", {"RAY_ADDRESS": "other:1"}) == "head:6379"
    assert resolve_address("auto", {"RAY_ADDRESS": "10.0.0.1:6379"}) == "10.0.0.1:6379"
    env = {"RAY_TMPDIR": str(tmp_path)}
    with pytest.raises(InputRefused, match="auto: no Ray was started on this machine"):
        resolve_address("auto", env)
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("10.0.0.2:6379\n")
    assert resolve_address("auto", env) == "10.0.0.2:6379"
    for wrong in ("head", "ray://head:10001", "http://head:8265"):
        with pytest.raises(InputRefused, match="is not host:port"):
            resolve_address(wrong, {})
    with pytest.raises(InputRefused, match="it is RAY_ADDRESS"):
        resolve_address("auto", {"RAY_ADDRESS": "http://head:8265"})


def test_a_machine_of_the_configuration_lends_its_gpus_in_name_to_a_cpu():
    assert session._stand_ins(ClusterConfig()) == 0
    assert session._stand_ins(ClusterConfig(nodes=[NodeConfig(gpus=4), NodeConfig(gpus=8)])) == 4


@pytest.mark.parametrize("address", ["127.0.0.1", "192.0.2.250"])
def test_the_interface_of_an_address(address):
    assert interface_of(address) == ("lo" if address == "127.0.0.1" else None)


def test_nodes_that_do_not_answer():
    def node(number: int, port: int, address: str = "127.0.0.1") -> Node:
        return Node(f"id-{number}", f"node {number}", address, port, 1, 1.0)

    with socket.socket() as answers, deaf_port() as other:
        answers.bind(("127.0.0.1", 0))
        answers.listen()
        port = answers.getsockname()[1]
        assert unanswering([node(0, port), node(1, other), node(2, port)]) == {"id-1"}
        assert unanswering([]) == set()
        watch = NodeWatch([node(0, port), node(1, other)])
        assert watch.lost() is None  # not yet time to ask
        begin = time.monotonic()
        while (lost := watch.lost()) is None:
            assert time.monotonic() - begin < 30
            time.sleep(0.05)
        assert lost.id == "id-1" and time.monotonic() - begin > ASK_SECONDS  # one silence alone is forgiven


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float16, torch.float32, torch.bool, torch.int64]
)
@pytest.mark.parametrize("shape", [(5,), (0,), (3, 2)])
def test_values_survive_the_store(dtype, shape):
    values = (torch.arange(12).reshape(-1)[: torch.Size(shape).numel()].reshape(shape) / 3).to(dtype)
    for back in (columns._unpack(columns._pack(values)), columns._outline(columns._inline(values))):
        assert back.dtype == dtype and back.shape == values.shape
        assert torch.equal(back.to(torch.float32), values.to(torch.float32))


def test_values_with_gradient_or_gaps_in_memory():
    assert columns._unpack(columns._pack(torch.ones(3, requires_grad=True) * 2)).tolist() == [2, 2, 2]
    transposed = torch.arange(6).reshape(2, 3).to(torch.bfloat16).T
    assert columns._unpack(columns._pack(transposed)).tolist() == [[0, 3], [1, 4], [2, 5]]
    assert columns._outline(columns._inline(transposed)).tolist() == [[0, 3], [1, 4], [2, 5]]


def test_what_is_small_travels_in_the_message():
    """64 KiB altogether; texts count with their length."""
    quarter = torch.zeros(4096)  # 16 KiB
    assert columns._is_small([quarter, quarter, ["x" * 1024] * 32]) and not columns._is_small(
        [quarter, quarter, ["x" * 1025] * 32]
    )
    assert columns._is_small([torch.zeros(16384)]) and not columns._is_small([torch.zeros(16385)])


@pytest.mark.parametrize(
    "text, log, cause",
    [
        ("Worker exits unexpectedly. Worker exits with an exit code 4.", [], "ended with exit code 4"),
        ("connection error code 2. End of file. the OOM killer due to high memory usage", [], "SIGKILL"),
        ("connection error code 2. End of file.", ["Fatal Python error: Segmentation fault"], "SIGSEGV"),
        (
            "1 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 1.2.3.4) was "
            "5.47GB used / 23.54GB limit (0.23)\nOOM kill reason: x\npid=1, actual memory used=3.02GB, worker",
            [],
            "(Memory on the node (IP: 1.2.3.4) was 5.47GB used / 23.54GB limit; this process held 3.02GB)",
        ),
        ("The actor died because its node has died. Node Id: ab", [], "its node died"),
    ],
)
def test_cause_of_death(text, log, cause):
    assert cause in cause_of_death(RayError(text), log)


UNREACHABLE, DEAD = ActorUnavailableError("keepalive watchdog timeout", None), ActorDiedError()


@pytest.mark.parametrize(
    "words, told, asked",
    [
        ([UNREACHABLE, DEAD], DEAD, 2),
        ([None], UNREACHABLE, 1),  # it lives
        ([GetTimeoutError("x")], UNREACHABLE, 1),
        ([UNREACHABLE] * 1000, UNREACHABLE, None),  # as long as it is asked
    ],
)
def test_who_is_out_of_reach_is_asked_for_until_ray_knows_how_it_died(monkeypatch, words, told, asked):
    monkeypatch.setattr(ray_pending, "DEATH_SECONDS", 60.0 if asked else 0.2)
    left = list(words)

    def get(*_, **__):
        word = left.pop(0)
        if word is not None:
            raise word

    monkeypatch.setattr(ray_pending.ray, "get", get)
    assert ray_pending.last_word(Mock(), UNREACHABLE) is told
    assert asked is None or len(words) - len(left) == asked
    left = list(words)
    assert ray_pending.last_word(Mock(), DEAD) is DEAD and left == words


@pytest.mark.parametrize(
    "error, dead", [(OutOfMemoryError("x"), True), (ActorDiedError(), True), (GetTimeoutError("x"), False)]
)
def test_every_way_to_die_counts_as_dead_when_a_group_is_closed(monkeypatch, error, dead):
    def get(*_, **__):
        raise error

    monkeypatch.setattr(ray_end.ray, "get", get)
    assert ray_end._is_dead(Mock(), 1.0) is dead


def test_processes_of_this_machine_are_gone_when_they_no_longer_run():
    ended = subprocess.Popen([sys.executable, "-c", ""])  # a zombie until it is waited for
    assert ray_end._until_gone([ended.pid], 20.0) == []
    assert ray_end._until_gone([ended.pid, os.getpid()], 0.05) == [os.getpid()]
    ended.wait()


@pytest.mark.parametrize(
    "answer, said",
    [
        ([], ""),
        ([7], "processes [7] of node n were told to end, and weren't gone after 10 s"),
        (GetTimeoutError("x"), "node n didn't say within 10 s whether its processes [7, 8] are gone"),
        (ActorDiedError(), "node n can't say whether its processes [7, 8] are gone: The actor died"),
    ],
)
def test_what_a_node_says_of_processes_that_end_there(monkeypatch, caplog, answer, said):
    def get(*_, **__):
        if isinstance(answer, Exception):
            raise answer
        return answer

    cancel, question = Mock(), Mock()
    monkeypatch.setattr(ray_end.ray, "get", get)
    monkeypatch.setattr(ray_end.ray, "cancel", cancel)
    ray_end._hear({question: ("n", [7, 8])}, time.monotonic())
    # Who hasn't answered isn't to wait on after us.
    assert cancel.mock_calls == [call(question, force=True)] * isinstance(answer, GetTimeoutError)
    assert [record.getMessage()[: len(said)] for record in caplog.records] == [said] * bool(said)


def test_tail_is_of_stderr_else_of_stdout_without_rays_own_lines(tmp_path):
    err, out = tmp_path / "worker-1-2-3.err", tmp_path / "worker-1-2-3.out"
    err.write_text(":job_id:01\n:actor_name:RoleProcess\n\n")
    out.write_text("".join(f"line {i}\n" for i in range(20)))
    assert read_tail(str(err)) == [f"line {i}" for i in range(12, 20)]
    err.write_text(":job_id:01\nlast words\n")
    assert read_tail(str(err)) == ["last words"]
    assert read_tail(str(tmp_path / "none.err")) == []
