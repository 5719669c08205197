"""Training with several workers of Ray Train: one process each, on one machine or many.

The workers share each batch; only the first writes to the folder of the run. When a worker dies,
all of them restart from the last checkpoint.
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
from pipeline.cluster.stop_signals import stop_on_signal
from pipeline.errors import Interrupted, StorageFault, UserError
from pipeline.storage.atomic import storage_fault
from pipeline.train.config import TrainConfig
from pipeline.train.run_folder import RunFolder
from pipeline.train.trainer import TrainOutcome, fit
from pipeline.train.watch import ConsoleWatch, SilentWatch, Watch

_DEATHS = 3  # restarts after a worker died, before the run fails
_POLL_S = 0.2  # interval at which the driver reads the progress


@dataclass(frozen=True)
class Progress:
    """Progress of the workers. lines: messages since the last reading.

    refused: the run ended with a UserError.
    """

    begun: tuple[int, int] | None  # steps done at the start, and steps to do in all
    done: int
    losses: dict[str, float]
    lines: list[str]
    refused: bool


class ProgressActor:
    """A Ray actor between the driver and the first worker."""

    def __init__(self) -> None:
        self._begun: tuple[int, int] | None = None
        self._done = 0
        self._losses: dict[str, float] = {}
        self._lines: list[str] = []
        self._stop = False
        self._end: TrainOutcome | Interrupted | UserError | None = None

    def say(self, line: str) -> None:
        """Keep a message for the driver."""
        self._lines.append(line)

    def begin(self, done: int, steps: int) -> None:
        """Note the steps done at the start and the steps to do in all."""
        self._begun, self._done = (done, steps), done

    def step(self, done: int, losses: dict[str, float]) -> bool:
        """Note that `done` steps are done, and return whether the run is to stop."""
        self._done, self._losses = done, losses
        return self._stop

    def stop(self) -> None:
        """Stop the run after the current step."""
        self._stop = True

    def end(self, result: TrainOutcome | Interrupted | UserError) -> None:
        """Note how the run ended; the first result counts."""
        self._end = self._end or result

    def has_ended(self) -> bool:
        """Return True when a worker that restarts has nothing to do."""
        return self._end is not None or self._stop

    def result(self) -> TrainOutcome | Interrupted | UserError | None:
        """Return how the run ended; None: the workers did not say."""
        return self._end or (Interrupted() if self._stop else None)

    def read(self) -> Progress:
        """Return the progress, with the messages since the last call."""
        refused = isinstance(self._end, UserError)
        progress = Progress(self._begun, self._done, self._losses, self._lines, refused)
        self._lines = []
        return progress


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
    """Train with `workers` workers of the cluster at `ray_address`, or of this machine.

    dataset, run, init_from: paths that are valid on every node.

    Raises: UserError: when settings, data or weights do not suit; Interrupted: when Ctrl-C,
    SIGTERM or SIGHUP stopped the run, after the state was saved; StorageFault: when workers keep
    dying.
    """
    run = run.absolute()
    RunFolder(run).require_run()
    with ExitStack() as stack:
        stack.enter_context(connected(ray_address))
        job = {
            "dataset": _absolute(dataset),
            "run": run,
            "config": _with_device(config, workers),
            "init_from": None if init_from is None else init_from.absolute(),
        }
        watch = SilentWatch() if console is None else ConsoleWatch(console, stack)
        return _train(job, workers, watch)


def _absolute(dataset: str | Path) -> str:
    """Return an absolute path, since workers have other working directories; keep a URI."""
    path = Path(dataset)
    return str(path.absolute()) if path.exists() else str(dataset)


def _with_device(config: TrainConfig, workers: int) -> TrainConfig:
    """Return the settings with "auto" replaced by a device.

    Raises: UserError: when the cluster has too few CPUs or GPUs for the workers.
    """
    have = [node["Resources"] for node in living_nodes()]
    cpus, gpus = (sum(node.get(kind, 0) for node in have) for kind in ("CPU", "GPU"))
    device = config.run.device
    if device == "auto":
        device = "cuda" if gpus else "cpu"
    kind, available = ("GPUs", gpus) if device == "cuda" else ("CPUs", cpus)
    if available < workers:
        raise UserError(
            f"{workers} workers need as many {kind}, but the cluster has {available:g}; lower "
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
    progress = ray.remote(num_cpus=0)(ProgressActor).options(scheduling_strategy=here).remote()
    scratch = job["run"] / ".ray"  # Ray Train needs a folder that all nodes see
    shutil.rmtree(scratch, ignore_errors=True)
    trainer = TorchTrainer(
        _work,
        train_loop_config={**job, "progress": progress},
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
        number = _follow(fitting, progress, watch)
        result = ray.get(progress.result.remote())
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if isinstance(result, TrainOutcome):
        return result
    if isinstance(result, Interrupted) and number is not None:
        raise Interrupted(number)
    if result is not None:
        raise result
    if failure:
        raise _fault(failure[0])
    raise StorageFault("the workers ended without a result; run the same command to resume")


def _follow(fitting: threading.Thread, actor: Any, watch: Watch) -> int | None:
    """Show the progress of the workers until they end, and return the signal that stopped them."""
    import ray

    begun = None
    with stop_on_signal() as request:
        while True:
            fitting.join(_POLL_S)
            progress: Progress = ray.get(actor.read.remote())
            for line in progress.lines:
                watch.say(line)
            if begun is None and progress.begun is not None:
                begun = progress.begun
                watch.begin(*begun)
            if progress.losses:
                watch.step(progress.done, progress.losses)
            if progress.refused or not fitting.is_alive():
                return request.number
            if request.number is not None:
                ray.get(actor.stop.remote())
                if begun is None:  # there is nothing to save
                    return request.number


def _work(job: dict[str, Any]) -> None:
    """Train on one worker. A UserError is not retried."""
    import ray
    import torch.distributed as dist

    progress = job["progress"]
    if ray.get(progress.has_ended.remote()):
        return
    try:
        watch = _RemoteWatch(progress) if dist.get_rank() == 0 else None
        outcome = fit(
            job["dataset"], job["run"], job["config"], init_from=job["init_from"], watch=watch
        )
    except (UserError, Interrupted) as fault:
        ray.get(progress.end.remote(fault))
        if isinstance(fault, Interrupted):
            return
        raise  # so that Ray Train ends the others, which wait for this worker
    if watch is not None:
        ray.get(progress.end.remote(outcome))


class _RemoteWatch:
    """A watch that informs the driver without waiting for it."""

    def __init__(self, progress: Any) -> None:
        self._progress = progress
        self._answer: Any = None

    def say(self, line: str) -> None:
        self._progress.say.remote(line)

    def begin(self, done: int, steps: int) -> None:
        self._progress.begin.remote(done, steps)

    def step(self, done: int, losses: Mapping[str, float]) -> bool:
        """Return the last answer that has arrived."""
        import ray

        stop = False
        if self._answer is not None:
            ready, _ = ray.wait([self._answer], timeout=0)
            if not ready:
                return False
            stop = ray.get(ready[0])
        self._answer = self._progress.step.remote(done, dict(losses))
        return stop


def _fault(error: BaseException) -> BaseException:
    """Return the error to raise for one that ended the workers; bugs stay what they are."""
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
