"""rayjob.yaml: its pods against the schemas of Kubernetes, the rest against KubeRay's fields."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from stages.generate.config import GenerateConfig
from tests.docker.files import PROJECT, load, pinned, stages, understood

# The fields of the custom resource ray.io/v1 of KubeRay 1.7.0, by level. The whole schema has 1.4 MB, mostly for pods.
FIELDS = {
    "spec": "activeDeadlineSeconds backoffLimit clusterSelector deletionStrategy entrypoint entrypointNumCpus entrypointNumGpus "
    "entrypointResources jobId managedBy metadata preRunningDeadlineSeconds rayClusterSpec runtimeEnvYAML shutdownAfterJobFinishes "
    "submissionMode submitterConfig submitterPodTemplate suspend ttlSecondsAfterFinished",
    "cluster": "authOptions autoscalerOptions enableInTreeAutoscaling gcsFaultToleranceOptions headGroupSpec headServiceAnnotations "
    "historyServerOptions managedBy networkPolicy rayVersion suspend tlsOptions upgradeStrategy workerGroupSpecs",
    "autoscaler": "args command env envFrom idleTimeoutSeconds image imagePullPolicy resources securityContext upscalingMode version "
    "volumeMounts",
    "head": "enableIngress headService ingressOptions labels rayStartParams resources serviceType template",
    "workers": "groupName idleTimeoutSeconds labels maxReplicas minReplicas numOfHosts priority rayStartParams replicas resources "
    "scaleStrategy suspend template",
}


@pytest.fixture(scope="module")
def job() -> dict[str, Any]:
    return load("rayjob.yaml")


@pytest.fixture(scope="module")
def cluster(job: dict[str, Any]) -> dict[str, Any]:
    return job["spec"]["rayClusterSpec"]


@pytest.fixture(scope="module")
def workers(cluster: dict[str, Any]) -> dict[str, Any]:
    (group,) = cluster["workerGroupSpecs"]
    return group


def test_kuberay_knows_every_field(job: dict[str, Any], cluster: dict[str, Any], workers: dict[str, Any]) -> None:
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    levels = {
        "spec": job["spec"],
        "cluster": cluster,
        "autoscaler": cluster["autoscalerOptions"],
        "head": cluster["headGroupSpec"],
        "workers": workers,
    }
    for level, fields in levels.items():
        assert set(fields) <= set(FIELDS[level].split())
    for group in (cluster["headGroupSpec"], workers):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())


def test_the_pods_match_the_schema_of_kubernetes_without_unknown_fields(
    cluster: dict[str, Any], workers: dict[str, Any]
) -> None:
    for group in (cluster["headGroupSpec"], workers):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **group["template"]}
        kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.skipif(
    "RAYJOB_CRD" not in os.environ, reason="RAYJOB_CRD names no file with KubeRay's ray.io_rayjobs.yaml"
)
def test_it_matches_the_whole_schema_of_kuberay(job: dict[str, Any]) -> None:
    definition = yaml.safe_load(Path(os.environ["RAYJOB_CRD"]).read_text())
    (version,) = [version for version in definition["spec"]["versions"] if version["name"] == "v1"]
    schema = closed(version["schema"]["openAPIV3Schema"])
    jsonschema.validate(job, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(job | {"spec": job["spec"] | {"backofflimit": 3}}, schema)


def closed(schema: Any) -> Any:
    """Return the schema without unknown fields, which a cluster would drop silently; a field may be int or string."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: closed(value) for key, value in schema.items()}
    if schema.get("x-kubernetes-int-or-string"):
        result.pop("type", None)
    if "properties" in schema and schema.get("type") == "object" and schema["properties"].keys() != {"metadata"}:
        result.setdefault("additionalProperties", bool(schema.get("x-kubernetes-preserve-unknown-fields")))
    return result


def test_versions_and_images_are_the_projects_own(cluster: dict[str, Any], workers: dict[str, Any]) -> None:
    assert cluster["rayVersion"] == pinned("ray")
    for group in (cluster["headGroupSpec"], workers):
        (container,) = group["template"]["spec"]["containers"]
        name, target = container["image"].split(":")
        assert name == PROJECT
        assert target in stages()
        assert f"USER {container['securityContext']['runAsUser']}:" in stages()[target]


def test_there_is_exactly_one_gpu_for_every_teacher(job: dict[str, Any], workers: dict[str, Any]) -> None:
    config = understood(job["spec"]["entrypoint"].split())
    assert isinstance(config, GenerateConfig)
    gpus = int(workers["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
    assert config.num_gpus == 1
    assert config.num_workers == gpus * workers["maxReplicas"]
    assert workers["minReplicas"] <= workers["replicas"] <= workers["maxReplicas"]


def test_workers_may_run_on_spot_nodes_and_the_head_may_not(cluster: dict[str, Any], workers: dict[str, Any]) -> None:
    assert "tolerations" not in cluster["headGroupSpec"]["template"]["spec"]
    tolerated = {toleration["key"] for toleration in workers["template"]["spec"]["tolerations"]}
    assert {"nvidia.com/gpu", "cloud.google.com/gke-spot", "kubernetes.azure.com/scalesetpriority"} <= tolerated
