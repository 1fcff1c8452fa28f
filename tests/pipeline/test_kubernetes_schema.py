"""The Kubernetes examples against the types of the fields they use: a misspelt or misplaced one is an error here.

An API server drops unknown fields without a word, so only names known below may stand. Written by hand after
ray-project/kuberay@0057210 ray-operator/apis/ray/v1/rayjob_types.go, @026f143 raycluster_types.go, the pod template in
@037e91b helm-chart/kuberay-operator/crds/ray.io_rayjobs.yaml, and Kubernetes' batch/v1. No cluster has seen the files.
"""

from __future__ import annotations

import copy
from pathlib import Path

import jsonschema
import pytest
import yaml

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "kuberay"
TEXT, COUNT, FLAG = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}


def fields(required: str = "", **known: dict) -> dict:
    """An object of these fields and no other."""
    return {"type": "object", "properties": known, "required": required.split(), "additionalProperties": False}


def listed(item: dict) -> dict:
    return {"type": "array", "items": item, "minItems": 1}


def texts(pattern: str = "") -> dict:
    """A map of texts: a bare number in YAML is refused by the server."""
    return {"type": "object", "additionalProperties": {"type": "string", "pattern": pattern}}


NAMED = fields("name", name=TEXT, optional=FLAG)
QUANTITIES = texts(r"^\d+(\.\d+)?(m|Ki|Mi|Gi|Ti|k|M|G|T)?$")
ENVIRONMENT = fields("name", name=TEXT, value=TEXT, valueFrom=fields(fieldRef=fields("fieldPath", fieldPath=TEXT)))
CONTAINER = fields(
    "name image",
    name=TEXT,
    image=TEXT,
    command=listed(TEXT),
    args=listed(TEXT),
    env=listed(ENVIRONMENT),
    envFrom=listed(fields(secretRef=NAMED, configMapRef=NAMED)),
    resources=fields(requests=QUANTITIES, limits=QUANTITIES),
    volumeMounts=listed(fields("name mountPath", name=TEXT, mountPath=TEXT, readOnly=FLAG)),
)
VOLUME = fields("name", name=TEXT, configMap=NAMED, emptyDir=fields(medium={"enum": ["", "Memory"]}, sizeLimit=TEXT))
POD = fields(
    "spec",
    spec=fields(
        "containers",
        containers=listed(CONTAINER),
        volumes=listed(VOLUME),
        serviceAccountName=TEXT,
        restartPolicy={"enum": ["Never", "OnFailure", "Always"]},
    ),
)
CLUSTER = fields(
    "headGroupSpec",
    rayVersion=TEXT,
    enableInTreeAutoscaling=FLAG,
    headGroupSpec=fields("rayStartParams template", rayStartParams=texts(), template=POD),
    workerGroupSpecs=listed(
        fields(
            "groupName minReplicas maxReplicas rayStartParams template",
            groupName=TEXT,
            **dict.fromkeys(("replicas", "minReplicas", "maxReplicas", "numOfHosts"), COUNT),
            rayStartParams=texts(),
            template=POD,
        )
    ),
)
RAY_JOB = fields(
    entrypoint=TEXT,
    shutdownAfterJobFinishes=FLAG,
    ttlSecondsAfterFinished=COUNT,
    backoffLimit=COUNT,
    activeDeadlineSeconds=COUNT,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode"]},
    rayClusterSpec=CLUSTER,
)
EXIT_CODES = fields(
    "operator values", containerName=TEXT, operator={"enum": ["In", "NotIn"]}, values=listed({"type": "integer"})
)
RULE = fields("action", action={"enum": ["FailJob", "FailIndex", "Ignore", "Count"]}, onExitCodes=EXIT_CODES)
JOB = fields("template", backoffLimit=COUNT, podFailurePolicy=fields("rules", rules=listed(RULE)), template=POD)
CRON_JOB = fields(
    "schedule jobTemplate",
    schedule=TEXT,
    timeZone=TEXT,
    concurrencyPolicy={"enum": ["Allow", "Forbid", "Replace"]},
    jobTemplate=fields("spec", spec=JOB),
)
KINDS = {("ray.io/v1", "RayJob"): RAY_JOB, ("batch/v1", "CronJob"): CRON_JOB}


def check(document: dict) -> None:
    spec = KINDS[document["apiVersion"], document["kind"]]
    whole = fields("metadata spec", apiVersion=TEXT, kind=TEXT, metadata=fields("name", name=TEXT), spec=spec)
    jsonschema.Draft202012Validator(whole).validate(document)
    for pod in pods(document):
        mounts = {mount["name"] for container in pod["containers"] for mount in container.get("volumeMounts", [])}
        assert mounts == {volume["name"] for volume in pod.get("volumes", [])}
        for resources in (container.get("resources", {}) for container in pod["containers"]):
            # An extended resource may not be overcommitted: request and limit are one.
            assert {name: value for name, value in resources.get("requests", {}).items() if "/" in name} == {
                name: value for name, value in resources.get("limits", {}).items() if "/" in name
            }


def pods(value: object) -> list[dict]:
    """Every pod's spec in a document."""
    if isinstance(value, list):
        return [pod for one in value for pod in pods(one)]
    if not isinstance(value, dict):
        return []
    return [value] if "containers" in value else [pod for one in value.values() for pod in pods(one)]


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_an_example_has_known_fields_of_the_right_type(path) -> None:
    check(yaml.safe_load(path.read_text()))


def test_what_a_server_would_drop_or_refuse_is_seen() -> None:
    good = yaml.safe_load((FOLDER / "rayjob.yaml").read_text())
    for key, value in (("ttlSecondsAfterFinish", 600), ("backoffLimit", "2"), ("submissionMode", "K8SJobMode")):
        with pytest.raises(jsonschema.ValidationError, match=str(value)):
            check({**good, "spec": {**good["spec"], key: value}})
    bare = copy.deepcopy(good)
    bare["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0
    with pytest.raises(jsonschema.ValidationError, match="0 is not of type 'string'"):
        check(bare)
    adrift = copy.deepcopy(good)
    adrift["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]["volumes"].pop()
    with pytest.raises(AssertionError):
        check(adrift)
