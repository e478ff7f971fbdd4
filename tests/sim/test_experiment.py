"""The live controller over the simulator's cluster: nothing is lost, nothing is exceeded, and chance is in the seed."""

from __future__ import annotations

from pathlib import Path

import pytest

from sllmdask.errors import ConfigError
from sllmdask.sim.experiment import simulate_policy
from sllmdask.sim.policies import POLICIES
from sllmdask.sim.scenario import Scenario, read_scenario, read_variation, varied, with_choices

CONFIGS = Path(__file__).parents[2] / "configs" / "sim"
SMALL = read_scenario(CONFIGS / "small.yaml")
BUSY = varied(varied(SMALL, "rps", 1.5), "duration", 60)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_examples_can_be_read(path):
    scenario = read_scenario(path)
    assert sum(node.slots * len(node.workers) for node in scenario.nodes()) == scenario.workers.count * scenario.workers.slots
    assert len(scenario.requests(0)) == round(scenario.workload.rps * scenario.workload.duration)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_same_seed_gives_the_same_run(policy):
    assert simulate_policy(BUSY, policy, 1) == simulate_policy(BUSY, policy, 1)


def test_another_seed_is_another_workload_and_all_policies_get_the_same():
    assert BUSY.requests(0) == with_choices(BUSY, ["ours"], None).requests(0) != BUSY.requests(1)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("deadline", [300, 1])
def test_every_request_ends_or_is_refused_and_neither_slots_nor_memory_are_exceeded(policy, deadline):
    scenario = varied(BUSY, "request_deadline", deadline)
    n_checks = 0

    def check(controller, cluster):
        nonlocal n_checks
        n_checks += 1
        for address, worker in controller.workers.items():
            assert cluster.n_slots_used(address) <= worker.slots
        for node in cluster._nodes:
            assert node.host.used <= node.host.capacity and node.disk.used <= node.disk.capacity

    run = simulate_policy(scenario, policy, 0, check=check)
    assert sorted(each.id for each in run.requests) == sorted(each.id for each in scenario.requests(0))
    assert n_checks > len(run.requests)
    for each in run.requests:
        assert 0 <= each.startup_s <= each.ttft_s <= each.end_to_end_s
        assert each.stalled_s >= 0 and each.startup_s + each.stalled_s <= each.end_to_end_s + 1e-9
        if each.start == "refused":
            assert each.startup_s >= deadline
    assert deadline == 300 or any(each.start == "refused" for each in run.requests)


def test_a_model_alone_is_loaded_once_and_then_everything_is_a_hit():
    data = SMALL.model_dump(mode="json")
    data["models"] = [{"name": "one", "size": "2GB", "max_instances": 1}]
    data["workers"] |= {"noise": 0, "peer": None}
    data["workers"]["disk"]["expected_bandwidth"] = 0
    data["workload"] |= {"arrivals": "poisson", "rps": 1.0, "lengths": "fixed", "output_tokens": 10}
    run = simulate_policy(Scenario.model_validate(data), "ours", 0)
    # 2 GiB at 1 GiB/s, and the overhead; whoever comes while it is read waits for the rest.
    first, *others = run.requests
    assert first.startup_s == pytest.approx(2.1) and first.start == "disk"
    assert run.loads == {"disk": 1} and run.estimate_errors == (pytest.approx(0.0),)
    assert {each.start for each in others} == {"disk", "hit"}
    assert all(each.startup_s == 0 for each in others if each.start == "hit")


def test_requests_of_the_warm_up_are_served_and_not_counted():
    whole = simulate_policy(BUSY, "ours", 0)
    rest = simulate_policy(varied(BUSY, "warm_up", 30), "ours", 0)
    assert rest.ended_at == whole.ended_at
    n_before = len(whole.requests) - len(rest.requests)
    assert rest.requests == whole.requests[n_before:] and 0 < n_before < len(whole.requests)


# --- what a file may say ---------------------------------------------------------------------------------------------


def broken(**parts):
    data = SMALL.model_dump(mode="json")
    for path, value in parts.items():
        *way, last = path.split("__")
        place = data
        for step in way:
            place = place[int(step)] if step.isdigit() else place[step]
        place[last] = value
    return data


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"policies": ["our"]}, "there is no policy 'our'; did you mean 'ours'?"),
        ({"workload__rsp": 2}, "unknown key 'workload.rsp'; did you mean 'rps'?"),
        ({"models__0__kep_alive": 2}, "unknown key 'models.0.kep_alive'; did you mean 'keep_alive'?"),
        ({"workload__rps": 0}, "workload.rps: Input should be greater than 0"),
        ({"workload__warm_up": 500}, "warm_up (500 s) is not shorter than duration (180 s)"),
        ({"models__0__num_gpus": 3}, "model small needs 3 slots, and a worker has 2"),
        ({"models__0__size": "9GB"}, "model small is larger than the host memory of a node"),
        ({"models__0__disk_copies": 3}, "model small has more copies than there are nodes (2)"),
        ({"models__1__name": "small"}, "the names small, small are not all different"),
        ({"models__0__host_copies": 2}, "the host_copies of the models do not fit"),
        ({"seeds": []}, "seeds"),
    ],
)
def test_a_file_that_cannot_be_right_is_refused_with_the_reason(tmp_path, parts, message):
    import yaml

    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(broken(**parts)))
    with pytest.raises(ConfigError) as error:
        read_scenario(path)
    assert message in str(error.value) and str(path) in str(error.value)


def test_a_key_is_varied_by_its_name_or_by_its_part_and_name():
    assert read_variation("rps=0.2,1,turns") == ("rps", [0.2, 1, "turns"])
    assert varied(SMALL, "workload.rps", 3).workload == SMALL.workload.model_copy(update={"rps": 3.0})
    assert varied(SMALL, "sharing", "shared").workers.sharing == "shared"
    assert varied(SMALL, "patience", 3).scheduler.patience == 3
    for wrong, message in (
        ("rsp", "did you mean 'workload.rps'?"),
        ("workload.rsp", "did you mean 'workload.rps'?"),
        ("models.size", "There is no 'models.size' to vary"),
    ):
        with pytest.raises(ConfigError, match="There is no") as error:
            varied(SMALL, wrong, 1)
        assert message in str(error.value)
    for wrong in ("rps", "rps=", "=3"):
        with pytest.raises(ConfigError, match="is not a variation"):
            read_variation(wrong)


def test_a_node_with_two_workers_has_one_disk_and_one_host_memory():
    scenario = varied(SMALL, "per_node", 2)
    (node,) = scenario.nodes()
    assert node.workers == (("sim://0", "0"), ("sim://1", "1")) and len(node.on_disk) == 8
    run = simulate_policy(scenario, "ours", 0)
    assert len(run.requests) == len(scenario.requests(0))
