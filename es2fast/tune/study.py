"""The search: optuna proposes, a trial trains and attacks, the journal in the folder keeps it all.

    DIR/tune.yaml, space.yaml   what is searched; another search into the same folder is refused
    DIR/journal.log             optuna's journal: every worker on the folder reads and appends
    DIR/trials/0007/            an ordinary run folder per trial
    DIR/front.png               drawn when a search ends

The same command again goes on; on the same folder several may run at once, on several machines too
where they share it. A trial whose worker is gone is put in the queue again (told by host and
process id, so only by a worker on the same host), and goes on in its folder where it was. A trial
that fails is recorded with its reason, as pruned where a safeguard stopped it, and the search goes
on.
"""

from __future__ import annotations

import os
import socket
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from es2fast.config import Config, load_config, save_config
from es2fast.errors import RunInterrupted, RunStopped, UserError
from es2fast.modeling.load import holds_model, load_model_config
from es2fast.run.files import write_text
from es2fast.run.folder import RunFolder
from es2fast.tune.space import Space, varied
from es2fast.tune.trial import describe, run_trial

NAME = "es2fast"
WORKER, REASON, REQUEUED, PLACE = "worker", "reason", "requeued", "folder"


class StudyFolder:
    """Names of what a search writes.

    Args:
        path: the folder; it need not exist.
    """

    def __init__(self, path: Path):
        self.path = path
        self.config = path / "tune.yaml"
        self.space = path / "space.yaml"
        self.journal = path / "journal.log"
        self.front = path / "front.png"

    def trial(self, number: int) -> Path:
        """The run folder of a trial."""
        return self.path / "trials" / f"{number:04d}"

    def picked(self, number: int) -> Path:
        """The run file of a picked trial."""
        return self.path / f"pick-{number}.yaml"


def optuna_module() -> Any:
    """optuna, quiet. Raises UserError: it is not installed."""
    if find_spec("optuna") is None:
        raise UserError("tune: optuna is not installed; pip install 'es2fast[tune]'")
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def open_study(folder: StudyFolder, seed: int = 0, *, create: bool = False) -> Any:
    """The study in a folder.

    Args:
        folder: where its journal is.
        seed: of the sampler; each worker adds its process id, lest two propose the same.
        create: start one where there is none.

    Raises:
        UserError: no study there, or a damaged one; optuna is missing.
    """
    optuna = optuna_module()
    if not create and not folder.journal.is_file():
        raise UserError(f"tune: {str(folder.path)!r} holds no search; give a model to start one")
    folder.path.mkdir(parents=True, exist_ok=True)
    backend = optuna.storages.journal.JournalFileBackend(str(folder.journal))
    try:
        return optuna.create_study(
            study_name=NAME,
            storage=optuna.storages.JournalStorage(backend),
            sampler=optuna.samplers.TPESampler(seed=seed + os.getpid(), constant_liar=True),
            directions=["minimize", "minimize"],  # worst, damage
            load_if_exists=True,
        )
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"tune: {str(folder.journal)!r} is damaged ({error}); restore it, or search into "
            "another folder"
        ) from None


def claim(folder: StudyFolder, config: Config, space_file: Path) -> None:
    """Writes what is searched, or checks that the folder searches the same.

    Raises:
        UserError: it searches something else, or is the folder of a model or a run.
    """
    space = space_file.read_text(encoding="utf-8")
    if holds_model(folder.path) or RunFolder(folder.path).occupied:
        raise UserError(
            f"--out: {str(folder.path)!r} holds a model or a run; choose another folder"
        )
    if folder.config.is_file():
        same = load_config(folder.config) == config
        if not same or folder.space.read_text(encoding="utf-8") != space:
            what = folder.config if not same else folder.space
            raise UserError(
                f"--out: {str(folder.path)!r} holds another search ({what.name} differs); choose "
                "another folder, or repeat its command"
            )
        return
    folder.path.mkdir(parents=True, exist_ok=True)
    write_text(folder.space, space)
    save_config(config, folder.config)


def search(
    folder: StudyFolder,
    config: Config,
    space: Space,
    *,
    trials: int,
    ranks: int | None = None,
    seed: int = 0,
) -> Any:
    """Runs trials until there are `trials` in all; returns the study.

    Args:
        folder: claimed.
        config: what is varied.
        space: how.
        trials: of all workers and earlier calls together.
        ranks: processes of a training.
        seed: of the sampler.
    """
    study = open_study(folder, seed, create=True)
    depth = load_model_config(config.model).get_text_config().num_hidden_layers
    requeue_lost(study)
    if not study.trials:
        study.enqueue_trial(space.point_of(config))
    while _begun(study) < trials:
        _one(study, folder, config, space, depth, ranks)
    return study


def _one(
    study: Any, folder: StudyFolder, config: Config, space: Space, depth: int, ranks: int | None
) -> None:
    """One trial, told to the study however it ends."""
    from optuna.trial import TrialState

    trial = study.ask()
    trial.set_user_attr(WORKER, _worker(os.getpid()))
    overrides = space.suggest(trial, depth)
    path = folder.trial(place(trial))
    print(f"trial {trial.number}: {describe(trial.params)}", flush=True)
    try:
        raw = varied(config) | {"output_dir": str(path)}
        found = run_trial(load_config(raw, overrides), ranks, _finished(study, folder))
    except UserError as error:
        state = TrialState.PRUNED if isinstance(error, RunStopped) else TrialState.FAIL
        trial.set_user_attr(REASON, str(error))
        study.tell(trial, state=state)
        print(f"trial {trial.number}: {state.name.lower()}: {error}", flush=True)
        return
    except RunInterrupted:  # the next worker goes on with it
        _requeue(study, trial.number)
        raise
    except Exception as error:  # a bug: seen by the user, and not met again on the next call
        trial.set_user_attr(REASON, f"{type(error).__name__}: {error}")
        study.tell(trial, state=TrialState.FAIL)
        raise
    except BaseException:  # interrupted: the next worker finds it in the queue
        trial.set_user_attr(REASON, "interrupted")
        _requeue(study, trial.number)
        raise
    for key, value in found.attributes().items():
        trial.set_user_attr(key, value)
    study.tell(trial, [found.worst, found.damage])
    print(
        f"trial {trial.number}: {found.attack} {100 * found.worst:.0f} % useful (base: worst "
        f"{100 * found.base_worst:.0f} %), damage {found.damage:.2f}",
        flush=True,
    )


def requeue_lost(study: Any) -> None:
    """Queues trials again whose worker was on this host and is gone."""
    from optuna.trial import TrialState

    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        host, _, pid = str(trial.user_attrs.get(WORKER, "")).rpartition(":")
        if host == socket.gethostname() and not _alive(int(pid)):
            _requeue(study, trial.number)


def _requeue(study: Any, number: int) -> None:
    from optuna.trial import TrialState

    trial = study.trials[number]
    study.tell(number, state=TrialState.FAIL)
    study.enqueue_trial(trial.params, user_attrs={REQUEUED: number, PLACE: place(trial)})


def place(trial: Any) -> int:
    """The number that a trial's folder has: its own, or that of the trial it goes on with."""
    return int(trial.user_attrs.get(PLACE, trial.number))


def _begun(study: Any) -> int:
    """Trials that ran or run; of one that was queued again, only the later one."""
    from optuna.trial import TrialState

    found = study.get_trials(deepcopy=False)
    lost = {trial.user_attrs.get(REQUEUED) for trial in found}
    return sum(t.state != TrialState.WAITING and t.number not in lost for t in found)


def _finished(study: Any, folder: StudyFolder) -> list[Path]:
    from optuna.trial import TrialState

    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return [folder.trial(place(trial)) for trial in done]


def _worker(pid: int) -> str:
    return f"{socket.gethostname()}:{pid}"


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
