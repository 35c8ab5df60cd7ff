"""Cluster configurations and the Dockerfile: what can be held against them without a cloud."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from ray.autoscaler._private.aws.config import bootstrap_aws
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.util import prepare_config
from ray.autoscaler.tags import NODE_KIND_WORKER, TAG_RAY_NODE_KIND, TAG_RAY_USER_NODE_TYPE
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig, FileConfigReader

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "cluster_configs"
LAUNCHED = ["aws", "gcp"]
"""Configurations of `ray up`."""
AUTOSCALED = [*LAUNCHED, "local-autoscaling"]
"""Configurations that Ray's own autoscaler reads."""
ON_KUBERNETES = "kuberay-rayjob"
SPILL_GB = 200
"""Disk that a worker has at least for objects that Ray spills."""

K8S_FIELDS = {
    "RayJob": {"apiVersion", "kind", "metadata", "spec"},
    "RayJobSpec": {
        "activeDeadlineSeconds",
        "backoffLimit",
        "entrypoint",
        "rayClusterSpec",
        "runtimeEnvYAML",
        "shutdownAfterJobFinishes",
        "submissionMode",
        "submitterConfig",
        "submitterPodTemplate",
        "suspend",
        "ttlSecondsAfterFinished",
    },
    "RayClusterSpec": {
        "authOptions",
        "autoscalerOptions",
        "enableInTreeAutoscaling",
        "headGroupSpec",
        "rayVersion",
        "workerGroupSpecs",
    },
    "AuthOptions": {"mode", "secretName"},
    "AutoscalerOptions": {
        "env",
        "idleTimeoutSeconds",
        "image",
        "resources",
        "upscalingMode",
        "version",
    },
    "HeadGroupSpec": {"headService", "rayStartParams", "serviceType", "template"},
    "WorkerGroupSpec": {
        "groupName",
        "idleTimeoutSeconds",
        "maxReplicas",
        "minReplicas",
        "rayStartParams",
        "replicas",
        "template",
    },
    "PodTemplateSpec": {"metadata", "spec"},
    "PodSpec": {
        "containers",
        "nodeSelector",
        "restartPolicy",
        "serviceAccountName",
        "tolerations",
        "volumes",
    },
    "Container": {"env", "envFrom", "image", "name", "resources", "volumeMounts"},
}
"""Fields of KubeRay 1.6 and of Kubernetes that the RayJob may use; there are more."""


def read(name: str) -> Any:
    return yaml.safe_load(text_of(name))


def text_of(name: str) -> str:
    return (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")


def autoscaling_config(name: str) -> AutoscalingConfig:
    """The file as Ray's autoscaler sees it: defaults filled in, held against Ray's schema."""
    reader = FileConfigReader(str(FOLDER / f"{name}.yaml"), skip_content_hash=True)
    return reader.get_cached_autoscaling_config()


def pinned() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").split()
    return dict(line.split("==") for line in lines)


def extras() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return set(project["optional-dependencies"])


def dockerfile() -> str:
    return (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8")


def values(tree: Any, key: str) -> Iterator[Any]:
    """All values of `key`, at any depth."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            if name == key:
                yield value
            yield from values(value, key)
    elif isinstance(tree, list):
        for value in tree:
            yield from values(value, key)


def test_all_configurations_are_looked_at():
    found = {path.stem for path in FOLDER.iterdir()}
    assert found == {*AUTOSCALED, ON_KUBERNETES}


@pytest.mark.parametrize("name", [*AUTOSCALED, ON_KUBERNETES])
def test_each_begins_with_what_to_know(name: str):
    head = text_of(name).split("\n\n")[0]
    assert all(line.startswith("#") for line in head.splitlines())
    for word in ("Change:", "Start", "Cost:", "Stop:"):
        assert f"# {word}" in head
    for job in re.findall(r"jobs/\w+\.py", head):
        assert (ROOT / job).is_file()


@pytest.mark.parametrize("name", AUTOSCALED)
def test_the_autoscaler_reads_it(name: str):
    config = autoscaling_config(name)
    types = config.get_node_type_configs()
    assert types is not None
    workers = [node_type for node_type in types if node_type != config.get_head_node_type()]
    assert workers
    assert config.get_idle_timeout_s() <= 600
    assert all(types[worker].min_worker_nodes == 0 for worker in workers)
    assert all(types[worker].max_worker_nodes > 0 for worker in workers)
    most = sum(types[worker].max_worker_nodes for worker in workers)
    assert config.get_max_num_worker_nodes() == most
    assert sum("GPU" in types[worker].resources for worker in workers) == 1


@pytest.mark.parametrize("name", LAUNCHED)
def test_nodes_run_one_image_and_hold_the_token_before_ray_starts(name: str):
    config = autoscaling_config(name)
    mounts = config.get_config("file_mounts")
    assert mounts["~/.ray/auth_token"] == "~/.ray/auth_token"
    types = config.get_node_type_configs()
    assert types is not None
    for node_type in types:
        docker = config.get_docker_config(node_type)
        extra = "gpu" if "GPU" in types[node_type].resources else "cpu"
        assert docker["image"].endswith(f"ray{pinned()['ray']}-{extra}")
        assert ("--gpus all" in docker.get("worker_run_options", [])) == (extra == "gpu")
        assert "--env RAY_AUTH_MODE=token" in docker["run_options"]
    assert "--env RAY_enable_autoscaler_v2=1" in docker["head_run_options"]
    # All is in the image: nothing is installed on the way, in whatever version.
    assert config.get_head_setup_commands() == []
    assert all(config.get_worker_setup_commands(node_type) == [] for node_type in types)


def test_the_local_recipe_sets_the_token_before_ray_starts():
    recipe = text_of("local-autoscaling").split("\n\n")[0]
    token = recipe.index("export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=")
    assert token < recipe.index("ray start")
    head_id = read("local-autoscaling")["provider"]["head_node_id"]
    assert f"ID={head_id}\n" in recipe
    for variable in ("RAY_enable_autoscaler_v2=1", "RAY_FAKE_CLUSTER=1"):
        assert recipe.index(variable) < recipe.index("ray start")


@pytest.mark.parametrize("name", AUTOSCALED)
def test_no_port_is_opened_but_ssh(name: str):
    config = autoscaling_config(name)
    rules = [rule for rules in values(read(name), "IpPermissions") for rule in rules]
    assert all(rule["FromPort"] == rule["ToPort"] == 22 for rule in rules)
    commands = config.get_head_start_ray_commands() + config.get_worker_start_ray_commands()
    assert not [command for command in commands if "--dashboard-host" in command]
    options = [option for options in values(read(name), "run_options") for option in options]
    assert not [option for option in options if re.match(r"(-p|--publish)\b", option)]


@pytest.mark.parametrize(("name", "key"), [("aws", "VolumeSize"), ("gcp", "diskSizeGb")])
def test_workers_have_disk_to_spill_to(name: str, key: str):
    node_types = read(name)["available_node_types"]
    for node_type in ("cpu", "gpu"):
        (size_gb,) = values(node_types[node_type], key)
        assert size_gb >= SPILL_GB


@pytest.mark.parametrize("name", LAUNCHED)
def test_the_head_stays_and_workers_are_spot(name: str):
    spot = {"aws": {"MarketType": "spot"}, "gcp": {"provisioningModel": "SPOT"}}[name]
    key = {"aws": "InstanceMarketOptions", "gcp": "scheduling"}[name]
    node_types = read(name)["available_node_types"]
    assert not list(values(node_types["head"], key))
    for node_type in ("cpu", "gpu"):
        (market,) = values(node_types[node_type], key)
        assert market.items() >= spot.items()


def unknown_fields(job: Any) -> list[str]:
    """Fields of a RayJob that KubeRay, or Kubernetes for pods, would not know."""
    cluster = job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    pods = [job["spec"]["submitterPodTemplate"], *(group["template"] for group in groups)]
    objects = [
        ("RayJob", job),
        ("RayJobSpec", job["spec"]),
        ("RayClusterSpec", cluster),
        ("AuthOptions", cluster["authOptions"]),
        ("AutoscalerOptions", cluster["autoscalerOptions"]),
        ("HeadGroupSpec", groups[0]),
        *(("WorkerGroupSpec", group) for group in groups[1:]),
        *(("PodTemplateSpec", pod) for pod in pods),
        *(("PodSpec", pod["spec"]) for pod in pods),
        *(("Container", container) for pod in pods for container in pod["spec"]["containers"]),
    ]
    return [f"{kind}.{field}" for kind, one in objects for field in one.keys() - K8S_FIELDS[kind]]


def test_kuberay_knows_all_fields():
    job = read(ON_KUBERNETES)
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert unknown_fields(job) == []
    job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["min_workers"] = 0
    assert unknown_fields(job) == ["WorkerGroupSpec.min_workers"]


def test_the_cluster_on_kubernetes_goes_with_its_job():
    spec = read(ON_KUBERNETES)["spec"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["ttlSecondsAfterFinished"] > 0
    cluster = spec["rayClusterSpec"]
    assert cluster["rayVersion"] == pinned()["ray"]
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["autoscalerOptions"]["version"] == "v2"
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    assert groups.keys() == {"cpu", "gpu"}
    for group in groups.values():
        assert (group["replicas"], group["minReplicas"]) == (0, 0)
        assert group["maxReplicas"] > 0


def test_all_pods_hold_the_token_and_say_what_they_need():
    spec = read(ON_KUBERNETES)["spec"]
    cluster = spec["rayClusterSpec"]
    auth = cluster["authOptions"]
    assert auth["mode"] == "token"
    workers = [group["template"] for group in cluster["workerGroupSpecs"]]
    for pod in [spec["submitterPodTemplate"], cluster["headGroupSpec"]["template"], *workers]:
        (container,) = pod["spec"]["containers"]
        env = {variable["name"]: variable for variable in container["env"]}
        assert env["RAY_AUTH_MODE"]["value"] == "token"
        secret = env["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]
        assert secret == {"name": auth["secretName"], "key": "auth_token"}
        requests, limits = (container["resources"][kind] for kind in ("requests", "limits"))
        assert requests.keys() == limits.keys() >= {"cpu", "memory"}
        extra = "gpu" if "nvidia.com/gpu" in limits else "cpu"
        assert container["image"].endswith(f"ray{pinned()['ray']}-{extra}")
    for pod in workers:
        (container,) = pod["spec"]["containers"]
        (mount,), (volume,) = container["volumeMounts"], pod["spec"]["volumes"]
        assert (mount["name"], mount["mountPath"]) == (volume["name"], "/tmp/ray")
        assert int(volume["emptyDir"]["sizeLimit"].removesuffix("Gi")) >= SPILL_GB
    assert ["nvidia.com/gpu" in str(pod) for pod in workers] == [False, True]


def test_images_are_of_the_pinned_ray_and_of_extras_that_exist():
    for text in (dockerfile(), *map(text_of, [*LAUNCHED, ON_KUBERNETES])):
        tags = re.findall(r"tac-ray:ray([\d.]+)-(\S+)", text)
        assert {version for version, _ in tags} == {pinned()["ray"]}
        assert {extra for _, extra in tags} <= extras() | {"$extra"}


def test_the_dockerfile_installs_what_the_project_says():
    text = dockerfile()
    (built,) = re.findall(r"for extra in (.+); do", text)
    (default,) = re.findall(r"^ARG EXTRA=(\w+)$", text, re.MULTILINE)
    assert {default} < set(built.split()) <= extras()
    (python,) = re.findall(r"^FROM python:(\d+\.\d+)-slim", text, re.MULTILINE)
    assert f"PYTHON ?= python{python}\n" in (ROOT / "Makefile").read_text(encoding="utf-8")
    (installed,) = re.findall(r'--constraint constraints.txt \\\n +"\.\[\$\{EXTRA\}\]" (.+)', text)
    assert set(installed.split()) <= pinned().keys()


def test_the_dockerfile_makes_what_launcher_and_kuberay_need():
    text = dockerfile()
    for tool in ("openssh-client", "rsync", "wget"):
        assert re.search(rf"apt-get install .*\b{tool}\b", text)
    # `ray up` mounts files of `~` where the image's HOME is.
    assert re.search(r"^ENV HOME=/home/ray\b", text, re.MULTILINE)
    assert re.findall(r"^USER (\w+)$", text, re.MULTILINE) == ["ray"]


def test_what_the_dockerfile_copies_is_there_and_nothing_else_is_sent():
    lines = re.findall(r"^COPY (.+) \S+$", dockerfile(), re.MULTILINE)
    copied = {source for line in lines for source in line.split()}
    assert all((ROOT / source).exists() for source in copied)
    ignore = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert ignore[0] == "*"
    assert {line[1:] for line in ignore if line.startswith("!")} == copied


@pytest.mark.integration
def test_ray_starts_nodes_on_aws_and_opens_no_port_but_ssh(
    s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # The server speaks EC2 and IAM too.
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    # Ray puts a key for SSH into ~/.ssh.
    monkeypatch.setenv("HOME", str(tmp_path))
    config = prepare_config(read("aws"))
    node_types, region = config["available_node_types"], config["provider"]["region"]
    ec2, iam = boto3.client("ec2", region), boto3.client("iam", region)
    image = ec2.describe_images()["Images"][0]["ImageId"]
    for node_type in node_types.values():
        node_type["node_config"]["ImageId"] = image
    for profile in ("tac-ray-head", "tac-ray-worker"):
        iam.create_instance_profile(InstanceProfileName=profile)

    # What the file says of the workers' instance types is what AWS says of them.
    said = {name: node_type.pop("resources") for name, node_type in node_types.items()}
    filled = AWSNodeProvider.fillout_available_node_types_resources(config)
    for name in ("cpu", "gpu"):
        known = filled["available_node_types"][name]["resources"]
        assert said[name].items() <= known.items()
        assert ("GPU" in said[name]) == ("GPU" in known)

    config = bootstrap_aws(filled)
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    for name, node_type in config["available_node_types"].items():
        tags = {TAG_RAY_NODE_KIND: NODE_KIND_WORKER, TAG_RAY_USER_NODE_TYPE: name}
        provider.create_node(dict(node_type["node_config"]), tags, 1)
    nodes = [
        node
        for reservation in ec2.describe_instances()["Reservations"]
        for node in reservation["Instances"]
    ]
    assert sorted(node.get("InstanceLifecycle", "") for node in nodes) == ["", "spot", "spot"]
    groups = {group["GroupId"] for node in nodes for group in node["SecurityGroups"]}
    described = ec2.describe_security_groups(GroupIds=sorted(groups))["SecurityGroups"]
    rules = [rule for group in described for rule in group["IpPermissions"]]
    open_ports = [(rule["FromPort"], rule["ToPort"]) for rule in rules if rule["IpRanges"]]
    assert open_ports == [(22, 22)]
    # All others let in nodes of the same group only.
    others = [rule for rule in rules if not rule["IpRanges"]]
    allowed = {pair["GroupId"] for rule in others for pair in rule["UserIdGroupPairs"]}
    assert allowed == groups
