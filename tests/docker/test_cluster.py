"""cluster.yaml, validated by the checks of `ray up`."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from jsonschema import ValidationError

from stages.generate.config import GenerateConfig
from tests.docker.files import PROJECT, commands_in_comments, load, stages, start_options, understood


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    return load("cluster.yaml")


def prepared(cluster: dict[str, Any]) -> dict[str, Any]:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(copy.deepcopy(cluster))
    validate_config(config)
    return config


def test_ray_accepts_it(cluster: dict[str, Any]) -> None:
    prepared(cluster)
    gpu = cluster["available_node_types"]["gpu"] | {"max_worker": 8}
    with pytest.raises(ValidationError):
        prepared(cluster | {"available_node_types": cluster["available_node_types"] | {"gpu": gpu}})


def test_nothing_is_installed_over_the_image(cluster: dict[str, Any]) -> None:
    """Ray's defaults would install a nightly build of Ray."""
    config = prepared(cluster)
    for step in ("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands"):
        assert config[step] == []
    name, target = config["docker"]["image"].split(":")
    assert name == PROJECT
    assert target in stages()


def test_only_workers_are_spot_and_every_node_may_use_the_bucket(cluster: dict[str, Any]) -> None:
    types = {name: kind["node_config"] for name, kind in cluster["available_node_types"].items()}
    spot = {name for name, node in types.items() if node.get("InstanceMarketOptions") == {"MarketType": "spot"}}
    assert spot == set(types) - {cluster["head_node_type"]}
    assert all(node["IamInstanceProfile"]["Arn"] and node["ImageId"] for node in types.values())


def test_the_command_in_its_first_lines_fits_the_cluster(cluster: dict[str, Any]) -> None:
    (command,) = commands_in_comments("cluster.yaml")
    config = understood(command)
    assert isinstance(config, GenerateConfig)
    gpu = cluster["available_node_types"]["gpu"]
    assert config.num_gpus == 1
    assert config.num_workers == gpu["max_workers"] * gpu["resources"]["GPU"] == cluster["max_workers"]


def test_the_nodes_start_commands_are_valid(cluster: dict[str, Any]) -> None:
    for command in prepared(cluster)["head_start_ray_commands"][1:]:
        assert start_options(command.split("ray start ")[1].split())["head"]
