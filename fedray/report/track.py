"""A run's numbers for TensorBoard, MLflow and Weights & Biases: listeners of a single run (a sweep has Ray Tune's
own)."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fedray.config.sections import Config
from fedray.errors import ConfigError
from fedray.federation.listening import Listener
from fedray.federation.prepare import Prepared


def numbers(record: dict[str, Any]) -> dict[str, float]:
    """The plain numbers of a round's record by name, as all trackers show them."""
    values = {f"metrics/{k}": v for k, v in (record["metrics"] or {}).items()}
    values |= {k: record.get(k) for k in ("train_loss", "exactness", "aggregation_error", "bytes_up", "bytes_down")}
    values |= {f"seconds/{k}": v for k, v in record["seconds"].items()}
    values["epsilon"] = max((record.get("epsilon") or {}).values(), default=None)
    if "dropped" in record:
        values["dropped"] = len(record["dropped"])
    return {k: float(v) for k, v in values.items() if v is not None}


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested config as one level of names, what is not set left out."""
    result: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            result |= flat(value, f"{prefix}{name}.")
        elif value is not None:
            result[prefix + name] = value
    return result


class Tracker:
    """Base: a listener that sends `numbers` of each record to `log`, from round 0 on, those of a resumed run again."""

    #: Why it is told nothing more.
    broken: str | None = None

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("_"):
            raise AttributeError(name)
        return lambda *args: None

    def started(self, prepared: Prepared) -> None:
        self.open(prepared.config, prepared.folder)

    def evaluated(self, record: dict[str, Any]) -> None:
        self._tell(record)

    def round(self, record: dict[str, Any]) -> None:
        self._tell(record)

    def _tell(self, record: dict[str, Any]) -> None:
        if self.broken is not None:
            return
        try:
            self.log(record["round"], numbers(record))
        except Exception as error:  # noqa: BLE001 - a tracker that is down must not end the run
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            self.broken = f"{type(self).__name__} was told nothing from round {record['round']} on: {reason}"

    def open(self, config: Config, folder: Path) -> None:
        raise NotImplementedError

    def log(self, round: int, values: dict[str, float]) -> None:
        raise NotImplementedError

    def close(self, finished: bool) -> None:
        """`finished`: whether the run came to its end."""
        raise NotImplementedError


class TensorBoard(Tracker):
    """Event files in RUN_DIR/tensorboard; of a resumed run the old ones are replaced, since all rounds are told
    again."""

    def open(self, config: Config, folder: Path) -> None:
        from tensorboardX import SummaryWriter

        for old in (folder / "tensorboard").glob("events.out.tfevents.*"):
            old.unlink()
        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def log(self, round: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, round)
        self._writer.flush()

    def close(self, finished: bool) -> None:
        if "_writer" in vars(self):
            self._writer.close()


class MLflow(Tracker):
    """A run of the experiment `fedray` (MLFLOW_EXPERIMENT_NAME) at MLFLOW_TRACKING_URI (default: RUN_DIR/mlflow.db)."""

    def __init__(self) -> None:
        _needs("mlflow")

    def open(self, config: Config, folder: Path) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient(
            tracking_uri=os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder / 'mlflow.db'}"
        )
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "fedray")
        experiment = self._client.get_experiment_by_name(name)
        self._run = self._client.create_run(
            experiment.experiment_id if experiment else self._client.create_experiment(name), run_name=folder.name
        ).info.run_id
        for key, value in flat(config.model_dump(mode="json")).items():
            self._client.log_param(self._run, key, str(value)[:500])

    def log(self, round: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._client.log_metric(self._run, name, value, step=round)

    def close(self, finished: bool) -> None:
        if "_run" in vars(self):
            self._client.set_terminated(self._run, "FINISHED" if finished else "KILLED")


class WandB(Tracker):
    """A run of the project `fedray` (WANDB_PROJECT); WANDB_MODE=offline keeps it in RUN_DIR/wandb."""

    def __init__(self) -> None:
        _needs("wandb")

    def open(self, config: Config, folder: Path) -> None:
        import wandb

        self._wandb_run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "fedray"),
            name=folder.name,
            dir=str(folder),
            config=flat(config.model_dump(mode="json")),
        )

    def log(self, round: int, values: dict[str, float]) -> None:
        self._wandb_run.log(values, step=round)

    def close(self, finished: bool) -> None:
        if "_wandb_run" in vars(self):
            self._wandb_run.finish(exit_code=0 if finished else 1)


TRACKERS = {"tensorboard": TensorBoard, "mlflow": MLflow, "wandb": WandB}


def _needs(package: str) -> None:
    try:
        __import__(package)
    except ImportError as error:
        raise ConfigError(f"output.track {package} needs it: pip install 'fedray[track]'") from error


def trackers(config: Config) -> list[Tracker]:
    """The trackers of `output.track`. Raises ConfigError for one that is not installed."""
    return [TRACKERS[name]() for name in config.output.track]


class Several:
    """A listener that tells several, in order."""

    def __init__(self, listeners: Sequence[Listener]):
        self._listeners = list(listeners)

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("_"):
            raise AttributeError(name)

        def tell(*args: Any) -> None:
            for listener in self._listeners:
                getattr(listener, name)(*args)

        return tell
