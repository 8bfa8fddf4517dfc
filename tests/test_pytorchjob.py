"""`launch/pytorchjob.yaml` is what Kubeflow's client library takes for a PyTorchJob."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from tests.distributed import REPOSITORY

training = pytest.importorskip("kubeflow.training", reason="needs kubeflow-training, of the extra `test`")
MANIFEST = REPOSITORY / "launch" / "pytorchjob.yaml"


def understood(manifest: Any) -> Any:
    """What is left of a manifest when the library has read it and writes it again.

    Raises:
        ValueError: a field is missing, or has a value that it cannot have.
    """
    api = training.ApiClient()
    read = api.deserialize(SimpleNamespace(data=json.dumps(manifest)), "KubeflowOrgV1PyTorchJob")
    return api.sanitize_for_serialization(read)


def test_the_manifest_is_understood_to_the_last_field() -> None:
    manifest = yaml.safe_load(MANIFEST.read_text())
    assert understood(manifest) == manifest


def test_a_wrong_manifest_is_not() -> None:
    manifest = yaml.safe_load(MANIFEST.read_text())
    manifest["spec"]["runPolicy"]["backofLimit"] = 3
    assert understood(manifest) != manifest
    del manifest["spec"]["pytorchReplicaSpecs"]
    with pytest.raises(ValueError, match="pytorch_replica_specs"):
        understood(manifest)


def test_both_pods_take_the_gpus_for_which_processes_are_started() -> None:
    spec = yaml.safe_load(MANIFEST.read_text())["spec"]
    for pods in spec["pytorchReplicaSpecs"].values():
        [container] = pods["template"]["spec"]["containers"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == spec["nprocPerNode"]
