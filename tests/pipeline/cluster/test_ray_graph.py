"""The graph on Ray: pools that fit, one operator or two, nodes that come and go."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.cluster.ray_graph import Pools, check_nodes, find_killers, plan_pools
from pipeline.cluster.run_tasks import Session, Work, run_rounds
from pipeline.cluster.task_rows import COMMITTED, REFUSED, STORAGE, TaskResult
from pipeline.dataset.schema import SCHEMA_VERSION, EncoderIdentity, XvectorIdentity
from pipeline.dataset.shards import iter_shards
from pipeline.dataset.verify import verify
from pipeline.errors import StorageFault, UserError
from pipeline.extract.config import ExtractConfig, load_config
from pipeline.extract.job import ExtractJob, TakenOver
from pipeline.extract.workload import extraction
from pipeline.songs.plan import PlannedSong, Task
from pipeline.storage.weight_files import WeightFile
from tests.helpers.checkpoints import write_hubert_base
from tests.pipeline.conftest import Extract, shard_hashes

GB = 2**30


def settings(overrides: Sequence[str] = ()) -> ExtractConfig:
    """Defaults, but for an f0 that needs no network."""
    return load_config(None, ["f0.method=praat", *overrides])


def tasks(count: int, minutes: float = 1.0) -> dict[int, Task]:
    def song(index: int) -> PlannedSong:
        return PlannedSong(f"ann/{index}.wav", "ann", b"x", 10**9, 1, minutes * 60)

    return {index: Task(index, "train", (song(index),)) for index in range(count)}


def node(cpus: float, memory_gb: float = 64.0, gpus: float = 0.0) -> dict[str, float]:
    return {"CPU": cpus, "memory": memory_gb * GB, "GPU": gpus}


def plan(
    nodes: list[dict[str, float]],
    tasks: dict[int, Task],
    config: ExtractConfig,
    weights: dict[str, WeightFile] | None = None,
    **more: Any,
) -> Pools:
    job = ExtractJob(Path(), Path(), config, "", weights or {}, **more)
    return plan_pools(nodes, tasks, extraction(job))


def test_one_worker_a_cpu_and_no_more_than_tasks() -> None:
    pools = plan([node(8), node(4)], tasks(100), settings())
    assert (pools.cpu, pools.gpu) == (12, 0)
    assert plan([node(8)], tasks(3), settings()).cpu == 3
    limited = settings(["workers.max_workers=2"])
    assert plan([node(8)], tasks(100), limited).cpu == 2


def test_memory_limits_the_pool_too() -> None:
    assert plan([node(64, memory_gb=4.2)], tasks(100, minutes=10), settings()).cpu == 4


def test_a_gpu_worker_takes_a_cpu_from_the_pool() -> None:
    pools = plan([node(8, gpus=2), node(8)], tasks(100), settings())
    assert (pools.cpu, pools.gpu) == (14, 2)
    on_cpu = settings(["encoder.device=cpu"])
    assert plan([node(8, gpus=2)], tasks(100), on_cpu).gpu == 0


def weights(gb: float, key: str = "encoder.checkpoint") -> dict[str, WeightFile]:
    return {key: WeightFile("hubert.pt", "", int(gb * GB), 0)}


def test_a_model_takes_memory_where_units_are_made() -> None:
    config, model = settings(), weights(1.0)
    alone = plan([node(8)], tasks(100), config)
    with_model = plan([node(8)], tasks(100), config, model)
    assert (with_model.memory - alone.memory) / GB == pytest.approx(2.1, abs=0.01)
    on_gpu = plan([node(8, gpus=1)], tasks(100), config, model)
    assert (on_gpu.memory, on_gpu.gpu_memory) == (alone.memory, with_model.memory)
    with pytest.raises(UserError, match=r"its models take 67\.0 GB"):
        plan([node(8)], tasks(100), config, weights(60))


def test_workers_that_do_not_all_fit_are_fewer_and_have_more_threads() -> None:
    config = settings()  # 0.82 + 1.1 + 1 GB each
    for memory_gb, expected in ((64, (8, 1)), (12, (4, 2)), (6, (2, 4)), (3, (1, 8))):
        pools = plan([node(8, memory_gb)], tasks(100), config, weights(1))
        assert (pools.cpu, pools.threads) == expected
    assert plan([node(6, 6)], tasks(100), config, weights(1)).threads == 2
    as_set = settings(["workers.cpus_per_worker=2"])
    pools = plan([node(8, 6)], tasks(100), as_set, weights(1))
    assert (pools.cpu, pools.threads) == (2, 2)


def test_threads_depend_neither_on_what_is_left_nor_on_a_change_of_memory() -> None:
    config = settings()
    for left in (1, 3, 100):
        assert plan([node(8, 12)], tasks(left), config, weights(1)).threads == 2
    resumed = plan([node(8, 64)], tasks(9), config, weights(1), threads=2)
    assert (resumed.cpu, resumed.threads) == (4, 2)
    assert plan([node(1)], tasks(9), config, weights(1), threads=2).threads == 1


def test_gpus_serve_where_any_encoder_may_use_one() -> None:
    further = ["encoder.device=cpu", "encoders.log-mel.device=auto"]
    assert plan([node(8, gpus=1)], tasks(9), settings(further)).gpu == 1
    none = ["encoder.device=cpu", "encoders.log-mel.device=cpu"]
    assert plan([node(8, gpus=1)], tasks(9), settings(none)).gpu == 0
    must = settings(["encoders.log-mel.device=cuda"])
    with pytest.raises(UserError, match=r"log-mel\.device is cuda, but no node .* to auto or cpu"):
        plan([node(8)], tasks(9), must)
    two = plan([node(2, gpus=2)], tasks(9), settings())
    assert (two.cpu, two.gpu) == (1, 1)  # songs need a CPU too


def test_a_network_of_f0_takes_memory_and_a_gpu() -> None:
    for method, networks in (("praat", 0), ("fcpe", 1), ("ensemble", 2)):
        config = load_config(None, [f"f0.method={method}", "encoder.device=cpu"])
        pools = plan([node(8)], tasks(9), config)
        assert pools.memory == pytest.approx((0.82 + 0.5 * networks) * GB, rel=1e-3)
        assert plan([node(8, gpus=1)], tasks(9), config).gpu == min(1, networks)
    over = TakenOver(Path("d"), "", SCHEMA_VERSION, True, (), None)
    config = load_config(None, ["f0.method=fcpe", "encoder.device=cpu"])
    assert plan([node(8, gpus=1)], tasks(9), config, taken_over=over).gpu == 0
    must = load_config(None, ["f0.method=fcpe", "f0.device=cuda"])
    with pytest.raises(UserError, match=r"f0\.device is cuda"):
        plan([node(8)], tasks(9), must)


def test_units_that_are_taken_over_ask_for_no_gpu() -> None:
    config = settings(["encoder.device=cuda"])
    mfcc = EncoderIdentity("mfcc", 39, "float16", 50.0, None)
    over = TakenOver(Path("d"), "", SCHEMA_VERSION, f0=False, units=(mfcc,), xvector=None)
    assert plan([node(8)], tasks(9), config, taken_over=over).gpu == 0
    assert plan([node(8, gpus=1)], tasks(9), config, taken_over=over).gpu == 0
    vectors = settings(["xvector.checkpoint=x", "xvector.device=cuda"])
    with pytest.raises(UserError, match=r"xvector\.device is cuda"):
        plan([node(8)], tasks(9), vectors, taken_over=over)
    over = replace(over, xvector=XvectorIdentity(12, ""))
    assert plan([node(8)], tasks(9), vectors, taken_over=over).gpu == 0


@pytest.mark.parametrize(
    ("nodes", "minutes", "words"),
    [
        ([node(0.5)], 1.0, "needs 1 CPUs .* offer 0.5 CPUs"),
        ([node(8, memory_gb=2)], 240.0, r"5\.6 GB \(task 0 holds 240 minutes"),
        ([node(1, gpus=1)], 1.0, "and 1 GPUs"),
        ([], 1.0, "offer nothing"),
    ],
)
def test_a_plan_that_cannot_fit_is_refused_with_numbers(
    nodes: list[dict[str, float]], minutes: float, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        plan(nodes, tasks(4, minutes), settings())


class Rounds:
    """Stands in for a cluster: what each round reports is given beforehand."""

    def __init__(self, *rounds: list[TaskResult]) -> None:
        self.rounds = list(rounds)
        self.asked: list[tuple[list[int], dict[int, set[str]]]] = []

    def __call__(
        self, waiting: dict[int, Task], crashed: dict[int, set[str]]
    ) -> Iterator[TaskResult]:
        self.asked.append((list(waiting), {k: set(v) for k, v in crashed.items()}))
        yield from self.rounds.pop(0) if self.rounds else []


def run(rounds: Rounds, killers: set[str]) -> Work:
    work = Work()
    run_rounds(Session(rounds, lambda: None, lambda task: killers), tasks(2), work)
    return work


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.cluster.run_tasks._STORAGE_WAITS_S", (0.0, 0.0, 0.0))


DONE = [TaskResult(0, COMMITTED), TaskResult(1, COMMITTED)]
FAULT = [TaskResult(0, STORAGE, detail="the storage failed"), TaskResult(1, STORAGE, detail="so")]


def test_a_task_that_twice_gave_no_result_is_redone_without_its_killers() -> None:
    rounds = Rounds(DONE[:1], [], DONE[1:])
    work = run(rounds, {"ann/1.wav"})
    assert rounds.asked[1] == ([1], {})
    assert rounds.asked[2] == ([1], {1: {"ann/1.wav"}})
    assert work.tasks_run == 2


def test_a_task_lost_once_with_its_node_is_simply_done_again() -> None:
    rounds = Rounds(DONE[:1], DONE[1:])
    assert run(rounds, {"ann/1.wav"}).tasks_run == 2
    assert rounds.asked[1] == ([1], {})


@pytest.mark.usefixtures("no_waiting")
def test_storage_faults_are_tried_again_and_then_end_the_run() -> None:
    assert run(Rounds([DONE[0], FAULT[1]], [DONE[1]]), set()).tasks_run == 2
    assert run(Rounds(FAULT, FAULT, FAULT, DONE), set()).tasks_run == 2
    with pytest.raises(StorageFault, match="the storage failed"):
        run(Rounds(FAULT, FAULT, FAULT, FAULT), set())


def test_weights_that_a_worker_cannot_load_end_the_run_in_words() -> None:
    with pytest.raises(UserError, match=r"^hubert\.pt changed"):
        run(Rounds([TaskResult(1, REFUSED, detail="hubert.pt changed")]), set())


def test_a_full_disk_ends_the_run_at_once() -> None:
    full = TaskResult(1, STORAGE, detail="no space left", disk_full=True)
    with pytest.raises(StorageFault, match="no space"):
        run(Rounds([full]), set())


def test_workers_that_die_though_every_song_passes_end_the_run() -> None:
    with pytest.raises(StorageFault, match="max_workers"):
        run(Rounds(), set())


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A Ray cluster of several nodes on this machine; the test adds them."""
    import ray
    from ray.cluster_utils import Cluster

    from pipeline.cluster.ray_connection import on_loopback

    with on_loopback():
        cluster = Cluster()
        yield cluster
        ray.shutdown()
        cluster.shutdown()


@pytest.mark.ray
def test_ray_writes_the_same_bytes_as_one_process(
    real_audio: Path, tmp_path: Path, run_extract: Extract
) -> None:
    """Real singing through 95 million parameters as fairseq's trainer writes them, beside mfcc."""
    songs = tmp_path / "songs"
    songs.mkdir()
    for name in ("vignesh.flac", "carnatic.flac", "soprano-E4.flac"):
        shutil.copy(real_audio / name, songs)
    checkpoint = write_hubert_base(tmp_path / "hubert_base.pt")
    settings = [
        "encoder.name=contentvec768l12",
        f"encoder.checkpoint={checkpoint}",
        "encoders.mfcc={}",
        "plan.task_minutes=0.05",
    ]
    run_extract(songs, tmp_path / "local", settings, speaker="real")
    outcome = run_extract(songs, tmp_path / "ray", settings, speaker="real", local=False)
    assert outcome.account.problems == []
    assert verify(tmp_path / "ray", songs).problems == []
    assert set(outcome.work.stage_s) == {
        "decode",
        "flac",
        "slice",
        "loudness",
        "f0",
        "quality",
        "units",
        "write",
    }
    assert shard_hashes(tmp_path / "ray") == shard_hashes(tmp_path / "local")


@pytest.mark.ray
def test_two_operators_write_the_same_bytes_as_one(
    corpus: Path, tmp_path: Path, run_extract: Extract, cluster: Any
) -> None:
    run_extract(corpus, tmp_path / "local")
    cluster.add_node(num_cpus=2, num_gpus=1)
    outcome = run_extract(corpus, tmp_path / "ray", local=False, ray_address=cluster.address)
    assert outcome.account.problems == []
    assert shard_hashes(tmp_path / "ray") == shard_hashes(tmp_path / "local")


@pytest.mark.ray
def test_a_lost_node_loses_no_clip(
    corpus: Path, tmp_path: Path, run_extract: Extract, cluster: Any
) -> None:
    run_extract(corpus, tmp_path / "local")
    cluster.add_node(num_cpus=1)
    second = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()

    def take_away() -> None:
        while not iter_shards(tmp_path / "ray"):
            time.sleep(0.05)
        cluster.remove_node(second, allow_graceful=False)

    thief = threading.Thread(target=take_away, daemon=True)
    thief.start()
    outcome = run_extract(corpus, tmp_path / "ray", local=False, ray_address=cluster.address)
    thief.join(30)
    assert not thief.is_alive()
    assert outcome.account.problems == []
    assert shard_hashes(tmp_path / "ray") == shard_hashes(tmp_path / "local")


@pytest.mark.ray
def test_a_node_that_does_not_see_the_corpus_is_named(tmp_path: Path, cluster: Any) -> None:
    import ray

    cluster.add_node(num_cpus=1)
    ray.init(cluster.address, logging_level="error")
    here = ray.nodes()[0]["NodeManagerHostname"]
    check_nodes(tmp_path, tmp_path)
    with pytest.raises(UserError, match=rf"node {here} .* does not share .*nowhere.*every node"):
        check_nodes(tmp_path, tmp_path / "nowhere")
    checkpoint = tmp_path / "hubert.pt"
    checkpoint.write_bytes(b"weights")
    seen = WeightFile(str(checkpoint), "", 7, 0)
    check_nodes(tmp_path, tmp_path, [seen])
    with pytest.raises(UserError, match=rf"node {here} .*hubert\.pt has 7 bytes there and 8 here"):
        check_nodes(tmp_path, tmp_path, [replace(seen, size=8)])
    checkpoint.unlink()
    with pytest.raises(UserError, match=rf"node {here} .*hubert\.pt: No such file"):
        check_nodes(tmp_path, tmp_path, [seen])
    assert list((tmp_path / ".tmp").iterdir()) == []


def test_songs_are_tried_alone_with_the_gpu_that_a_worker_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def remote(**options: Any) -> Any:
        asked.append(options)
        return lambda function: function

    monkeypatch.setattr("pipeline.cluster.ray_graph.ray.remote", remote)
    monkeypatch.setattr("pipeline.cluster.ray_graph._dies", lambda *words: words[-1] == "ann/0.wav")
    one = tasks(1)
    job = ExtractJob(Path(), Path(), settings(["workers.gpus_per_worker=0.5"]), "", weights(1))
    for gpus in (0.0, 0.5):
        asked.clear()
        pools = plan_pools([node(8, gpus=2 * gpus)], one, extraction(job))
        assert find_killers(extraction(job), one[0], pools) == {"ann/0.wav"}
        assert [options["num_gpus"] for options in asked] == [gpus, gpus]


@pytest.mark.ray
def test_a_cluster_that_is_not_there_is_named(
    corpus: Path, tmp_path: Path, run_extract: Extract
) -> None:
    with pytest.raises(UserError, match=r"127\.0\.0\.1:1"):
        run_extract(corpus, tmp_path / "d", local=False, ray_address="127.0.0.1:1")
