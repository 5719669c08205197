"""`fit` on several workers, by Ray Train: one process each, on one machine or many.

The workers share each batch and write no more than one would: the first of them has the folder of
the run. One that dies takes the others with it, and all begin again from the last checkpoint.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
import threading
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline.cluster.ray_connection import connected
from pipeline.cluster.ray_graph import living_nodes
from pipeline.errors import Interrupted, StorageFault, UserError
from pipeline.storage.atomic import storage_fault
from pipeline.train.config import TrainConfig
from pipeline.train.run_folder import RunFolder
from pipeline.train.trainer import TrainOutcome, fit, stop_asked
from pipeline.train.watch import Nobody, OnConsole, Watch

_DEATHS = 3  # of a worker, each since the last start, before the run is given up
_LOOK_S = 0.2  # how often the driver looks at how far the workers are


@dataclass(frozen=True)
class News:
    """How far the workers are. lines: what they had to say since the last look.

    refused: there is something for the user to put right; nothing more will come.
    """

    begun: tuple[int, int] | None  # steps done at the start, and wanted
    done: int
    losses: dict[str, float]
    lines: list[str]
    refused: bool


class Post:
    """Between the driver and the first worker: an actor of its own."""

    def __init__(self) -> None:
        self._begun: tuple[int, int] | None = None
        self._done = 0
        self._losses: dict[str, float] = {}
        self._lines: list[str] = []
        self._stop = False
        self._end: TrainOutcome | Interrupted | UserError | None = None

    def say(self, line: str) -> None:
        self._lines.append(line)

    def begin(self, done: int, steps: int) -> None:
        self._begun, self._done = (done, steps), done

    def step(self, done: int, losses: dict[str, float]) -> bool:
        """Whether the run shall stop."""
        self._done, self._losses = done, losses
        return self._stop

    def stop(self) -> None:
        self._stop = True

    def end(self, what: TrainOutcome | Interrupted | UserError) -> None:
        """The first word counts."""
        self._end = self._end or what

    def has_ended(self) -> bool:
        return self._end is not None or self._stop

    def ending(self) -> TrainOutcome | Interrupted | UserError | None:
        return self._end or (Interrupted() if self._stop else None)

    def news(self) -> News:
        refused = isinstance(self._end, UserError)
        news = News(self._begun, self._done, self._losses, self._lines, refused)
        self._lines = []
        return news


def train_on_ray(
    dataset: str | Path,
    run: Path,
    config: TrainConfig,
    workers: int,
    ray_address: str | None = None,
    *,
    init_from: Path | None = None,
    console: Console | None = None,
) -> TrainOutcome:
    """`fit` on `workers` workers of the cluster at `ray_address`, or of this machine.

    dataset, run, init_from: as every node sees them.
    Raises: as `fit`; StorageFault where workers keep dying.
    """
    run = run.absolute()
    RunFolder(run).require_ours()
    with ExitStack() as held:
        held.enter_context(connected(ray_address))
        job = {
            "dataset": _everywhere(dataset),
            "run": run,
            "config": _on_devices(config, workers),
            "init_from": None if init_from is None else init_from.absolute(),
        }
        watch = Nobody() if console is None else OnConsole(console, held)
        return _train(job, workers, watch)


def _everywhere(dataset: str | Path) -> str:
    """Workers have a working directory of their own; a URI stays as it is."""
    path = Path(dataset)
    return str(path.absolute()) if path.exists() else str(dataset)


def _on_devices(config: TrainConfig, workers: int) -> TrainConfig:
    """With the device said. Raises UserError where the cluster has too little for the workers."""
    have = [node["Resources"] for node in living_nodes()]
    cpus, gpus = (sum(node.get(kind, 0) for node in have) for kind in ("CPU", "GPU"))
    device = config.run.device
    if device == "auto":
        device = "cuda" if gpus else "cpu"
    kind, there = ("GPUs", gpus) if device == "cuda" else ("CPUs", cpus)
    if there < workers:
        raise UserError(
            f"{workers} workers need as many {kind}, and the cluster has {there:g}; lower "
            "--workers" + (", or set run.device to cpu" if device == "cuda" else "")
        )
    return dataclasses.replace(config, run=dataclasses.replace(config.run, device=device))


def _train(job: dict[str, Any], workers: int, watch: Watch) -> TrainOutcome:
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
    for name in ("ray.train", "ray.tune", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"ray\.")
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    post = ray.remote(num_cpus=0)(Post).options(scheduling_strategy=here).remote()
    scratch = job["run"] / ".ray"  # Ray Train wants a folder that all nodes see
    shutil.rmtree(scratch, ignore_errors=True)
    trainer = TorchTrainer(
        _work,
        train_loop_config={**job, "post": post},
        scaling_config=ScalingConfig(
            num_workers=workers, use_gpu=job["config"].run.device == "cuda"
        ),
        run_config=RunConfig(
            name="train",
            storage_path=str(scratch),
            failure_config=FailureConfig(max_failures=_DEATHS),
        ),
    )
    failure: list[BaseException] = []

    def run() -> None:
        try:
            trainer.fit()
        except BaseException as error:  # noqa: BLE001  # raised again where the run is followed
            failure.append(error)

    fitting = threading.Thread(target=run, daemon=True)
    fitting.start()
    try:
        _follow(fitting, post, watch)
        ending = ray.get(post.ending.remote())
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if isinstance(ending, TrainOutcome):
        return ending
    if ending is not None:
        raise ending
    if failure:
        raise _fault(failure[0])
    raise StorageFault("the workers ended without a word")


def _follow(fitting: threading.Thread, post: Any, watch: Watch) -> None:
    """Pass on what the workers do until there is no more; the first Ctrl-C asks them to end."""
    import ray

    begun = None
    with stop_asked() as asked:
        while True:
            fitting.join(_LOOK_S)
            news: News = ray.get(post.news.remote())
            for line in news.lines:
                watch.say(line)
            if begun is None and news.begun is not None:
                begun = news.begun
                watch.begin(*begun)
            if news.losses:
                watch.step(news.done, news.losses)
            if news.refused or not fitting.is_alive():
                return
            if asked.is_set():
                ray.get(post.stop.remote())


def _work(job: dict[str, Any]) -> None:
    """On each worker. What the user can put right is not tried again."""
    import ray
    import torch.distributed as dist

    post = job["post"]
    if ray.get(post.has_ended.remote()):
        return
    try:
        watch = _Reporting(post) if dist.get_rank() == 0 else None
        outcome = fit(
            job["dataset"], job["run"], job["config"], init_from=job["init_from"], watch=watch
        )
    except (UserError, Interrupted) as fault:
        ray.get(post.end.remote(fault))
        if isinstance(fault, Interrupted):
            return
        raise  # the others wait for this worker, and would for ever
    if watch is not None:
        ray.get(post.end.remote(outcome))


class _Reporting:
    """Tells the driver, and does not wait for it."""

    def __init__(self, post: Any) -> None:
        self._post = post
        self._answer: Any = None

    def say(self, line: str) -> None:
        self._post.say.remote(line)

    def begin(self, done: int, steps: int) -> None:
        self._post.begin.remote(done, steps)

    def step(self, done: int, losses: Mapping[str, float]) -> bool:
        """By the last answer that has come."""
        import ray

        stop = False
        if self._answer is not None:
            ready, _ = ray.wait([self._answer], timeout=0)
            if not ready:
                return False
            stop = ray.get(ready[0])
        self._answer = self._post.step.remote(done, dict(losses))
        return stop


def _fault(error: BaseException) -> BaseException:
    """What ended the workers, for the person who runs them; a bug of ours stays what it is."""
    causes = getattr(error, "worker_failures", {})
    for cause in causes.values():
        inner = getattr(cause, "_base_exc", cause)
        if isinstance(inner, OSError) and inner.errno is not None:
            return storage_fault(inner)
        if not isinstance(inner, RuntimeError) and not _is_rays(inner):
            return inner  # type: ignore[no-any-return]
    words = [f"worker {rank}: {_first_line(cause)}" for rank, cause in sorted(causes.items())]
    return StorageFault(
        f"the workers failed more than {_DEATHS} times ({'; '.join(words) or _first_line(error)})"
    )


def _is_rays(error: BaseException) -> bool:
    return type(error).__module__.startswith("ray.")


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
