"""Deployments, settings and hardware as people write them; sizes, rates and durations; and the files in configs/."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dask.config
import distributed
import pytest
import yaml
from pydantic import BaseModel

from sllmdask.cluster.dask_settings import DISTRIBUTED, read_settings
from sllmdask.config import (
    CostPriors,
    Deployment,
    RouterConfig,
    Settings,
    parse,
    read_deployment,
    read_file,
    read_hardware,
)
from sllmdask.errors import ConfigError
from sllmdask.units import format_bytes, format_seconds, parse_bytes, parse_rate, parse_seconds

REPOSITORY = Path(__file__).parent.parent
CONFIGS = REPOSITORY / "configs"
GiB = 1024**3

#: From the documentation of ServerlessLLM, "Storage Aware Scheduling".
OPT_2_7B = """{
    "model": "opt-2.7b",
    "backend": "transformers",
    "num_gpus": 1,
    "auto_scaling_config": {
        "metric": "concurrency",
        "target": 1,
        "min_instances": 0,
        "max_instances": 10
    },
    "placement_config": {
        "target_nodes": ["0"]
    },
    "backend_config": {
        "pretrained_model_name_or_path": "facebook/opt-2.7b",
        "device_map": "auto",
        "torch_dtype": "float16"
    }
}"""
OPT_1_3B = OPT_2_7B.replace("2.7b", "1.3b").replace('["0"]', '["1"]')
HARDWARE = """{
  "0": {
    "host_size": "32GB",
    "host_bandwidth": "24GB/s",
    "disk_size": "128GB",
    "disk_bandwidth": "5GB/s",
    "network_bandwidth": "10Gbps"
  },
  "1": {
    "host_size": "32GB",
    "host_bandwidth": "24GB/s",
    "disk_size": "128GB",
    "disk_bandwidth": "5GB/s",
    "network_bandwidth": "10Gbps"
  }
}"""


def deployment(**fields: Any) -> Deployment:
    return parse(Deployment, {"model": "qwen", **fields}, "the deployment")


def refusal(**fields: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        deployment(**fields)
    return caught.value


# --- files of ServerlessLLM ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "size", "node"), [(OPT_2_7B, "2.7b", "0"), (OPT_1_3B, "1.3b", "1")])
def test_a_deployment_file_of_serverlessllm_is_read_unchanged(tmp_path: Path, text: str, size: str, node: str) -> None:
    path = tmp_path / f"config-opt-{size}.json"
    path.write_text(text)
    read = read_deployment(path)
    assert (read.model, read.backend, read.num_gpus) == (f"opt-{size}", "transformers", 1)
    scaling = read.auto_scaling_config
    assert (scaling.metric, scaling.target, scaling.min_instances, scaling.max_instances) == ("concurrency", 1, 0, 10)
    assert scaling.keep_alive is None
    assert read.placement_config.nodes == (node,)
    assert read.source == f"facebook/opt-{size}"
    assert (read.backend_config.device_map, read.backend_config.torch_dtype) == ("auto", "float16")
    assert read.model_dump(mode="json", exclude_unset=True) == json.loads(text)


def test_a_hardware_file_of_serverlessllm_is_read_with_prefixes_of_1024(tmp_path: Path) -> None:
    path = tmp_path / "hardware_config.json"
    path.write_text(HARDWARE)
    nodes = read_hardware(path)
    assert set(nodes) == {"0", "1"}
    for node in nodes.values():
        assert (node.host_size, node.disk_size) == (32 * GiB, 128 * GiB)
        assert (node.host_bandwidth, node.disk_bandwidth) == (24 * GiB, 5 * GiB)
        assert node.network_bandwidth == 10 * GiB / 8
        assert node.pcie_bandwidth is None


@pytest.mark.parametrize(("nbytes", "seconds"), [(5_303_193_600, 0.98780), (2_631_516_160, 0.49016)])
def test_five_gigabytes_per_second_give_the_loading_times_that_serverlessllm_prints(nbytes: int, seconds: float) -> None:
    assert nbytes / parse_rate("5GB/s") == pytest.approx(seconds, abs=5e-6)


def test_yaml_says_the_same_as_json(tmp_path: Path) -> None:
    path = tmp_path / "opt.yaml"
    path.write_text(yaml.safe_dump(json.loads(OPT_2_7B)))
    assert read_deployment(path) == parse(Deployment, json.loads(OPT_2_7B))


# --- deployments -----------------------------------------------------------------------------------------------------


def test_a_name_alone_is_a_deployment_of_the_hub_model_of_that_name() -> None:
    assert deployment(model="Qwen/Qwen2.5-0.5B").source == "Qwen/Qwen2.5-0.5B"
    assert deployment(backend_config={"pretrained_model_name_or_path": "/models/qwen"}).source == "/models/qwen"


def test_local_disk_names_the_nodes_where_target_nodes_does_not() -> None:
    assert deployment(placement_config={"local_disk": ["1"]}).placement_config.nodes == ("1",)
    both = deployment(placement_config={"local_disk": ["1"], "target_nodes": ["0"]})
    assert both.placement_config.nodes == ("0",) and both.warnings() == []


@pytest.mark.parametrize(
    ("fields", "key", "near"),
    [
        ({"num_gpu": 1}, "num_gpu", "num_gpus"),
        ({"auto_scaling_config": {"min_instance": 1}}, "auto_scaling_config.min_instance", "min_instances"),
        ({"backend_config": {"torch_type": "auto"}}, "backend_config.torch_type", "torch_dtype"),
        ({"placement_config": {"target_node": ["0"]}}, "placement_config.target_node", "target_nodes"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(fields: dict[str, Any], key: str, near: str) -> None:
    error = refusal(**fields)
    assert f"unknown key {key!r}; did you mean {near!r}?" in error.message
    assert error.param == key


def test_an_unknown_key_that_is_near_to_nothing_is_refused_with_all_known_ones() -> None:
    message = refusal(router_config={"zzz": 1}).message
    assert "unknown key 'router_config.zzz'; known keys: migration_delta." in message


def test_every_mistake_of_a_file_is_told_at_once() -> None:
    message = refusal(num_gpu=1, auto_scaling_config={"target": 0}).message
    assert "num_gpus" in message
    assert "auto_scaling_config.target" in message


def test_a_deployment_without_a_model_says_so() -> None:
    with pytest.raises(ConfigError, match="The deployment is wrong: model is missing") as caught:
        parse(Deployment, {}, "the deployment")
    assert caught.value.param == "model"


@pytest.mark.parametrize("name", ["", "../etc/passwd", "/abs", "a//b", "a/../b", "a b", "-x", ".hidden", "a/", "ü", "a" * 201])
def test_a_name_that_is_no_name_is_refused(name: str) -> None:
    assert "is not a name: use letters, digits" in refusal(model=name).message


@pytest.mark.parametrize("name", ["qwen", "Qwen/Qwen2.5-0.5B", "opt-2.7b", "org/team/model:v1_2"])
def test_names_of_hubs_are_names(name: str) -> None:
    assert deployment(model=name).model == name


@pytest.mark.parametrize("backend", ["", "../vllm", "a b", "a:b", "x" * 201])
def test_a_backend_by_a_name_that_is_no_name_is_refused(backend: str) -> None:
    assert f"backend {backend!r} is not a name: use letters, digits" in refusal(backend=backend).message


def test_an_instance_of_another_backend_is_another_one() -> None:
    variants = [deployment(), deployment(backend="costs"), deployment(backend_config={"torch_dtype": "float32"})]
    assert len({each.variant for each in variants}) == 3
    assert deployment().backend == "transformers"


@pytest.mark.parametrize(
    ("backend_config", "words"),
    [
        ({"hf_model_class": "AutoModelForSeq2SeqLM"}, "only AutoModelForCausalLM is"),
        ({"quantization_config": {"load_in_8bit": True}}, "serve an unquantised checkpoint"),
        ({"hf_model_class": "AutoModelForSequenceClassification"}, "AutoModel for embeddings"),
        ({"enable_lora": False, "lora_adapters": {"a": "/adapters/a"}}, "but enable_lora is false"),
        ({"lora_adapters": {"a": "/adapters/a"}, "task": "embed"}, "not for embedding models"),
        ({"lora_adapters": {"a:b": "/adapters/a"}}, "'a:b' is not a name"),
        ({"lora_adapters": {"..": "/adapters/a"}}, "'..' is not a name"),
        ({"task": "generate", "pooling": "mean"}, "are for embeddings"),
        ({"task": "generate", "hf_model_class": "AutoModel"}, "are for embeddings"),
        ({"task": "classify"}, "backend_config.task"),
        ({"pooling": "magic"}, "backend_config.pooling"),
        ({"torch_dtype": "int8"}, "backend_config.torch_dtype"),
        ({"max_model_len": 0}, "backend_config.max_model_len"),
    ],
)
def test_what_cannot_be_run_as_asked_is_refused_with_the_reason(backend_config: dict[str, Any], words: str) -> None:
    assert words in refusal(backend_config=backend_config).message


@pytest.mark.parametrize(
    ("scaling", "words"),
    [
        ({"min_instances": 3, "max_instances": 2}, "min_instances (3) is above max_instances (2)"),
        ({"min_instances": -1}, "min_instances"),
        ({"max_instances": 0}, "max_instances"),
        ({"target": 0}, "target"),
        ({"metric": "freeness"}, "metric"),
        ({"keep_alive": "soon"}, "'soon' is not a duration"),
    ],
)
def test_an_impossible_scaling_is_refused(scaling: dict[str, Any], words: str) -> None:
    assert words in refusal(auto_scaling_config=scaling).message


@pytest.mark.parametrize("num_gpus", [0, -1, 1.5, "many"])
def test_an_instance_takes_a_whole_positive_number_of_slots(num_gpus: Any) -> None:
    assert "num_gpus" in refusal(num_gpus=num_gpus).message


def test_a_deployment_cannot_be_changed_after_it_was_checked() -> None:
    with pytest.raises(ValueError, match="frozen"):
        deployment().model = "other"


def test_what_is_said_of_moves_has_an_effect() -> None:
    assert deployment(router_config={"migration_delta": 5}, scheduler_config={"alpha": 0.1}).warnings() == []
    assert (RouterConfig().migration_delta, CostPriors().alpha, CostPriors().beta) == (20, 0.01, 0.1)


@pytest.mark.parametrize(
    ("backend_config", "task"),
    [
        ({}, "auto"),
        ({"hf_model_class": "AutoModel"}, "embed"),
        ({"pooling": "last"}, "embed"),
        ({"normalize": False}, "embed"),
        ({"task": "embed"}, "embed"),
        ({"task": "generate"}, "generate"),
    ],
)
def test_what_a_deployment_asks_for_embeddings_by(backend_config: dict[str, Any], task: str) -> None:
    assert deployment(backend_config=backend_config).backend_config.wanted_task == task


def test_instances_that_make_other_vectors_are_other_instances() -> None:
    given = (
        {"task": "embed"},
        {"task": "embed", "pooling": "cls"},
        {"task": "embed", "normalize": False},
        {},
        {"task": "generate"},
    )
    variants = [deployment(backend_config=each).backend_config.variant for each in given]
    assert len(set(variants)) == 4 and variants[3] == variants[4]


def test_adapters_are_accepted_and_a_switch_without_any_is_warned_of() -> None:
    assert deployment(backend_config={"enable_lora": True, "lora_adapters": {"a": "org/a"}}).warnings() == []
    assert deployment(backend_config={"lora_adapters": {"a": "org/a"}}).warnings() == []
    (warning,) = deployment(backend_config={"enable_lora": True}).warnings()
    assert "enable_lora has no effect" in warning


def test_the_warnings_survive_the_way_to_the_scheduler() -> None:
    sent = deployment(backend_config={"device_map": "cpu"}).model_dump(mode="json", exclude_unset=True)
    assert len(parse(Deployment, sent).warnings()) == 1


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.json", "{", "is neither JSON nor YAML"),
        ("a.yaml", "a: [", "is neither JSON nor YAML"),
        ("missing.json", None, "Cannot read"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, text: str | None, words: str) -> None:
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_file(path)
    assert words in caught.value.message
    assert name in caught.value.message
    assert "\n" not in caught.value.message


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="Cannot read"):
        read_deployment(path)


@pytest.mark.parametrize("text", ["[]", "{}", "3"])
def test_a_hardware_file_without_nodes_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "hardware.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="must map node names to their hardware"):
        read_hardware(path)


def test_a_mistake_in_a_hardware_file_names_the_node(tmp_path: Path) -> None:
    path = tmp_path / "hardware.json"
    path.write_text('{"3": {"disk_bandwith": "5GB/s"}}')
    with pytest.raises(ConfigError, match="did you mean 'disk_bandwidth'") as caught:
        read_hardware(path)
    assert "Node '3'" in caught.value.message


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.fixture
def dask_configuration(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What Dask makes of environment variables and files, without those of this machine."""

    def collect(*files: Mapping[str, Any], **environment: str) -> None:
        collected = dask.config.merge(*files, dask.config.collect_env(environment))
        monkeypatch.setitem(dask.config.global_config, "sllmdask", collected.get("sllmdask", {}))

    return collect


def test_without_any_configuration_the_settings_are_the_defaults(dask_configuration: Any) -> None:
    dask_configuration()
    assert read_settings() == Settings()


def test_the_environment_goes_over_files_and_flags_go_over_the_environment(dask_configuration: Any) -> None:
    file = {"sllmdask": {"server": {"port": 1, "host": "::1"}, "scheduler": {"keep-alive": "5m"}}}
    dask_configuration(file, DASK_SLLMDASK__SERVER__PORT="2", DASK_SLLMDASK__ENGINE__KV_MEMORY="1GiB")
    settings = read_settings({"server": {"port": None, "max_body_bytes": "1MiB"}})
    assert (settings.server.port, settings.server.host) == (2, "::1")
    assert (settings.scheduler.keep_alive, settings.engine.kv_memory) == (300.0, GiB)
    assert settings.server.max_body_bytes == 1024**2
    assert read_settings({"server": {"port": 3}}).server.port == 3


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"server": {"prot": 1}}, "unknown key 'server.prot'; did you mean 'port'?"),
        ({"sever": {}}, "unknown key 'sever'; did you mean 'server'?"),
        ({"server": {"port": 70000}}, "server.port"),
        ({"engine": {"device": "tpu"}}, "engine.device"),
        ({"worker": {"host_memory": "much"}}, "'much' is not a size"),
    ],
)
def test_a_wrong_setting_is_refused_before_anything_starts(dask_configuration: Any, tree: dict[str, Any], words: str) -> None:
    dask_configuration({"sllmdask": tree})
    with pytest.raises(ConfigError) as caught:
        read_settings()
    assert "Dask's configuration under 'sllmdask:' is wrong" in caught.value.message
    assert words in caught.value.message


# --- the files in configs/ -------------------------------------------------------------------------------------------


def keys(value: Any, prefix: str = "") -> set[str]:
    """The dotted names of all leaves."""
    if isinstance(value, BaseModel):
        value = {name: getattr(value, name) for name in type(value).model_fields}
    if not isinstance(value, Mapping):
        return {prefix}
    return {key for name, inner in value.items() for key in keys(inner, f"{prefix}.{name}" if prefix else name)}


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found


def test_the_reference_has_every_setting_with_its_default() -> None:
    tree = read_file(CONFIGS / "reference.yaml")
    assert set(tree) == {"sllmdask"}
    assert keys(tree["sllmdask"]) == keys(Settings())
    assert parse(Settings, tree["sllmdask"]) == Settings()
    assert tree["sllmdask"] == Settings().model_dump(mode="json")


def test_the_reference_says_something_about_every_setting() -> None:
    lines = (CONFIGS / "reference.yaml").read_text().splitlines()
    settings = [i for i, line in enumerate(lines) if re.match(r"    \w+: ", line)]
    assert len(settings) == len(keys(Settings()))
    assert all(lines[i - 1].lstrip().startswith("# ") for i in settings)


def test_the_page_of_settings_has_every_key_of_settings_and_deployments() -> None:
    page = (REPOSITORY / "docs" / "configuration.md").read_text()
    assert {key for key in keys(Settings()) if f"`{key}`" not in page} == set()
    parts = [deployment(), *(getattr(deployment(), name) for name in Deployment.model_fields)]
    fields = {name for part in parts if isinstance(part, BaseModel) for name in type(part).model_fields}
    assert {name for name in fields if f"`{name}`" not in page} == set()


def test_the_recommended_settings_of_dask_are_those_that_up_uses() -> None:
    assert flat(read_file(CONFIGS / "dask.yaml")) == dict(DISTRIBUTED)


def test_every_recommended_setting_is_one_that_dask_has_and_is_explained() -> None:
    theirs = flat(read_file(Path(distributed.__file__).parent / "distributed.yaml"))
    page = (REPOSITORY / "docs" / "dask.md").read_text()
    for key in DISTRIBUTED:
        assert key in theirs or key.startswith("distributed.nanny.pre-spawn-environ."), key
        assert f"`{key.removeprefix('distributed.')}`" in page, key


def test_the_example_of_a_deployment_can_be_deployed() -> None:
    read = read_deployment(CONFIGS / "deployment-example.json")
    assert read.source == f"demo:{read.model}"
    assert read.auto_scaling_config.keep_alive == 120
    assert read.warnings() == []


def test_the_files_of_the_migration_example_are_read_and_put_the_long_model_on_both_nodes() -> None:
    example = CONFIGS.parent / "examples" / "live_migration"
    for size, nodes, delta in (("3b", ("0", "1"), 20), ("1.5b", ("0",), 10)):
        read = read_deployment(example / f"config-qwen-{size}.json")
        assert read.model == read.source == f"Qwen/Qwen2.5-{size.upper()}-Instruct"
        assert read.placement_config.nodes == read.placement_config.memory_pool == nodes
        assert (read.router_config.migration_delta, read.auto_scaling_config.target, read.warnings()) == (delta, 1, [])


# --- units -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("512", 512),
        ("4096B", 4096),
        ("1k", 1024),
        ("1.5 MiB", 3 * 2**19),
        ("4 GiB", 4 * GiB),
        ("32GB", 32 * GiB),
        ("32 gb", 32 * GiB),
        ("2TB", 2048 * GiB),
        ("1P", 1024**5),
        (17, 17),
        (2.9, 2),
    ],
)
def test_sizes_have_prefixes_of_1024_however_they_are_written(text: Any, nbytes: int) -> None:
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize(
    ("text", "bytes_per_s"),
    [
        ("5GB/s", 5 * GiB),
        ("24 GiB/s", 24 * GiB),
        ("500MB/S", 500 * 1024**2),
        ("10Gbps", 10 * GiB / 8),
        ("100 Mbps", 100 * 1024**2 / 8),
        (1e9, 1e9),
    ],
)
def test_bandwidths_are_in_bytes_unless_they_end_in_bps(text: Any, bytes_per_s: float) -> None:
    assert parse_rate(text) == bytes_per_s


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("250 ms", 0.25),
        ("30s", 30.0),
        ("30", 30.0),
        ("5m", 300.0),
        ("2h", 7200.0),
        ("1d", 86400.0),
        ("1.5h", 5400.0),
        ("-1", -1.0),
        (0, 0.0),
        (0.1, 0.1),
    ],
)
def test_durations_are_seconds_unless_they_have_a_unit(text: Any, seconds: float) -> None:
    assert parse_seconds(text) == pytest.approx(seconds)


@pytest.mark.parametrize("parse_one", [parse_bytes, parse_rate, parse_seconds])
@pytest.mark.parametrize("text", ["", "fast", "GB", "1 XB", "--1", "1 2", True, None])
def test_what_is_no_quantity_is_refused_with_an_example(parse_one: Any, text: Any) -> None:
    with pytest.raises(ConfigError, match="write for example"):
        parse_one(text)


def test_a_negative_size_and_a_size_without_its_bandwidth_are_refused() -> None:
    for text in ("-1GB", "5GB/s"):
        with pytest.raises(ConfigError, match="is not a size"):
            parse_bytes(text)
    with pytest.raises(ConfigError, match="is not a bandwidth"):
        parse_rate("5GB")


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (4 * GiB, "4.0 GiB"),
        (3 * 1024**4, "3.0 TiB"),
        (5000 * 1024**4, "5000.0 TiB"),
    ],
)
def test_sizes_are_shown_in_the_largest_unit_that_fits(nbytes: float, text: str) -> None:
    assert format_bytes(nbytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0123, "12 ms"), (1.0, "1.0 s"), (59.94, "59.9 s"), (75, "1m15s"), (60, "1m00s"), (3600, "60m00s")]
)
def test_durations_are_shown_as_people_say_them(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
