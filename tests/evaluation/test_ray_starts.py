"""When a RayExecutor starts workers, tries again, and which it takes: on a stand-in for Ray."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from itertools import chain, pairwise, repeat
from typing import Any

import pytest

from autopeft import RayExecutor
from autopeft.evaluation.context import Compute
from tests.ray_stand_in import ADDRESS, HERE, START_SECONDS, Cluster, executor_on, records_of, trial


def test_a_search_begins_with_the_workers_that_could_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(chain([True], repeat(False)), repeat((60.0, True)))
    executor = executor_on(cluster, monkeypatch)
    assert executor.free == 1
    assert cluster.now == START_SECONDS


def test_it_does_not_wait_for_a_worker_for_which_there_is_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(iter([True, None]), repeat((60.0, True)))
    executor = executor_on(cluster, monkeypatch)
    assert executor.free == 1
    assert cluster.now < 100
    executor.submit(trial(0))
    assert executor.wait() == 0


def test_while_another_trains_they_are_tried_again_after_longer_and_longer_pauses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    failures = 12
    cluster = Cluster(chain([True], repeat(False, failures), [True]), iter([(1e4, True)]))
    executor = executor_on(cluster, monkeypatch)
    executor.submit(trial(0))
    assert executor.wait() is None  # the other worker has come, which may have a job at once
    assert executor.free == 1
    assert executor.wait() == 0
    assert executor.free == 2
    first, *others = cluster.starts
    assert (first, others[0]) == (0, 0)
    pauses = [later - earlier - START_SECONDS for earlier, later in pairwise(others)]
    assert pauses == [1, 2, 4, 8, 16, 32, *repeat(64, failures - 6)]


def test_a_lost_trial_waits_for_a_worker_that_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(
        iter([True, True, False, True, True]), iter([(1.0, False), (2.0, False), *repeat((60.0, True), 2)])
    )
    executor = executor_on(cluster, monkeypatch)
    for number in (0, 1):
        executor.submit(trial(number))
    finished = records_of(executor)
    assert {next(finished), next(finished)} == {0, 1}


def test_it_is_an_error_where_no_worker_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    never = Cluster(repeat(False), iter([]))
    with pytest.raises(ValueError, match="A worker could not be started"):
        executor_on(never, monkeypatch)
    assert len(never.starts) == 4  # two at once, and two in their place
    cluster = Cluster(chain([True] * 2, repeat(False)), iter([(1.0, False), (500.0, False)]))
    executor = executor_on(cluster, monkeypatch)
    for number in (0, 1):
        executor.submit(trial(number))
    with pytest.raises(ValueError, match="A worker could not be started"):
        executor.wait()
    assert cluster.now > 500


@pytest.mark.parametrize(
    ("there", "match"),
    [
        (
            replace(HERE, device="cuda", precision="bf16-mixed", dtype="bfloat16"),
            r"with bfloat16 weights in bf16-mixed on its cuda.*with float32 weights in 32-true on its cpu"
            r'.*Search\(dtype="bfloat16", training=Training\(precision="bf16-mixed"\)\)',
        ),
        (replace(HERE, precision="bf16-mixed"), r'as by Search\(training=Training\(precision="bf16-mixed"\)'),
        (replace(HERE, fingerprint="1"), "it has loaded another backbone than this process"),
    ],
)
def test_a_worker_that_would_train_otherwise_than_the_driver_counts_is_refused(
    there: Compute, match: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trials = repeat((60.0, True))
    with pytest.raises(ValueError, match=match):
        executor_on(Cluster(repeat(True), trials, computes=repeat(there)), monkeypatch)
    for computes in (chain([HERE], repeat(there)), chain([there, HERE], repeat(there))):
        assert executor_on(Cluster(repeat(True), trials, computes=computes), monkeypatch).free == 1
    assert re.search(match, caplog.text)


def test_a_worker_that_finds_another_folder_at_the_searchs_path_is_refused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its rungs would begin anew, and the driver would not find what it trained."""
    trials = repeat((60.0, True))
    match = "it finds another folder at /.* than this process. The search's folder .* that all hosts share"
    with pytest.raises(ValueError, match=match):
        executor_on(Cluster(repeat(True), trials, shares=repeat(False)), monkeypatch)
    cluster = Cluster(repeat(True), trials, shares=chain([True], repeat(False)))
    assert executor_on(cluster, monkeypatch).free == 1
    assert re.search(match, caplog.text)


def test_a_host_is_known_by_its_loopback_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.ray_stand_in.ADDRESS", "10.0.0.5:6379")
    for address in ("10.0.0.5:6379", "127.0.0.1:6379", "127.0.1.1:6379"):
        assert executor_on(Cluster(repeat(True), iter([])), monkeypatch, address=address).free == 2
    with pytest.raises(ValueError, match=r"beforehand, at 10\.0\.0\.5:6379"):
        executor_on(Cluster(repeat(True), iter([])), monkeypatch, address="127.0.0.1:6380")


def test_the_address_of_another_cluster_than_this_process_is_in_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def executor_at(address: str | None) -> Any:
        return executor_on(Cluster(repeat(True), iter([])), monkeypatch, address=address)

    for address in (None, "auto", ADDRESS, ADDRESS.replace("127.0.0.1", "localhost")):
        assert executor_at(address).free == 2
    for address in ("127.0.0.1:6380", "10.0.0.1:6379", "ray://127.0.0.1:6379", "local"):
        with pytest.raises(ValueError, match=f"beforehand, at {ADDRESS} and not at '{address}'"):
            executor_at(address)


def test_a_worker_on_another_device_that_trains_the_same_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver of GPU workers may have none."""
    there = replace(HERE, device="cuda")
    cluster = Cluster(repeat(True), repeat((60.0, True)), computes=repeat(there))
    assert executor_on(cluster, monkeypatch, workers=1).free == 1


def test_workers_that_live_on_do_not_shorten_the_pauses_of_those_that_do_not_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One dies while starts have failed for long, and another that was idle says that it lives."""
    trials = iter([(1.0, False), (1000.0, False), (10.0, True), (1e4, True)])
    cluster = Cluster(chain([True] * 3, repeat(False)), trials)
    executor = executor_on(cluster, monkeypatch, workers=3)
    for number in (0, 1):
        executor.submit(trial(number))
    finished = records_of(executor)
    assert [next(finished), next(finished)] == [0, 1]
    died = 1000 + START_SECONDS
    assert died in cluster.starts
    assert sum(died < start < died + 60 for start in cluster.starts) <= 1, "those that failed before"


def test_an_idle_worker_that_died_with_another_is_replaced_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(repeat(True), iter([(1.0, False), (60.0, True)]), lives=iter([False]))
    executor = executor_on(cluster, monkeypatch)
    executor.submit(trial(0))
    assert next(records_of(executor)) == 0
    assert cluster.starts == [0, 0, 4, 4]
    assert executor.free == 2


def test_a_cluster_may_be_too_small_for_all_workers_but_not_for_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    nodes = [({"CPU": 8.0, "GPU": 1.0}, True), ({"CPU": 8.0, "GPU": 4.0}, False)]
    cluster = Cluster(iter([True, None, None]), repeat((60.0, True)), nodes_have=nodes)
    executor = executor_on(cluster, monkeypatch, workers=3, gpus_per_worker=1)
    assert executor.free == 1
    assert "The cluster has room for 1 of 3 workers" in caplog.text
    with pytest.raises(
        ValueError, match="A worker takes 1 CPU and 2 GPU, which no node has: they have 8 CPU and 1 GPU"
    ):
        executor_on(cluster, monkeypatch, gpus_per_worker=2)


def test_there_is_room_on_nodes_and_not_between_them(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [({"CPU": 4.0, "GPU": 3.0}, True), ({"CPU": 4.0, "GPU": 3.0}, True), ({}, True)]

    def room(**settings: Any) -> int:
        cluster = Cluster(repeat(True), repeat((60.0, True)), nodes_have=nodes)
        return int(executor_on(cluster, monkeypatch, workers=None, **settings).free)

    assert room(gpus_per_worker=2) == 2
    assert room(cpus_per_worker=3) == 2
    assert room(gpus_per_worker=0.75) == 6, "a worker's share is of one GPU"
    with pytest.raises(ValueError, match="they have 0 CPU and 0 GPU; 4 CPU and 3 GPU"):
        room(gpus_per_worker=4)


def test_it_is_said_that_the_first_worker_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cluster = Cluster(repeat(None), iter([]))
    with pytest.raises(ValueError, match="No worker found a place in the cluster within 30 minutes"):
        executor_on(cluster, monkeypatch)
    assert caplog.text.count("No worker has started within a minute") == 1
    executor_on(Cluster(repeat(True), iter([])), monkeypatch)
    assert caplog.text.count("No worker has started within a minute") == 1


def test_other_workers_are_waited_for_for_a_minute_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where one after another comes, or fails to."""
    cluster = Cluster(chain([True, None], repeat(False)), iter([]))
    executor_on(cluster, monkeypatch, workers=3)
    assert cluster.now == START_SECONDS + 60


@pytest.mark.parametrize("gpus", [1.5, -1.0, math.inf, math.nan])
def test_gpus_are_a_whole_number_or_a_share_of_one(gpus: float) -> None:
    with pytest.raises(ValueError, match=f"a whole number of GPUs or a share below 1, got {gpus}"):
        RayExecutor(workers=1, gpus_per_worker=gpus)
