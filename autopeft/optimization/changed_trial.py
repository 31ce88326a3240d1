"""Give a finished trial of a study in memory other values, which Optuna has no call for."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from optuna.storages import InMemoryStorage
from optuna.study import Study
from optuna.trial import TrialState

_OF_A_STORAGE = ("_lock", "_get_trial", "_set_trial")


def change_trial(study: Study, number: int, state: TrialState, values: Sequence[float] | None) -> bool:
    """Change the outcome of a finished trial; its parameters stay the same objects.

    To make the study anew instead takes a second at 1,000 trials of 121 parameters.

    Args:
        study: A study in memory with several objectives: the best trial of one objective is not looked for.
        number: The trial.
        state: How it ended now.
        values: Its objectives now; None where it has none.

    Returns:
        Whether it was changed: not where the storage, or its Optuna, is another.
    """
    storage = study._storage
    if not isinstance(storage, InMemoryStorage) or not all(hasattr(storage, name) for name in _OF_A_STORAGE):
        return False
    with storage._lock:
        trial_id = storage.get_trial_id_from_study_id_trial_number(study._study_id, number)
        trial = copy.copy(storage._get_trial(trial_id))
        trial.state = state
        trial.values = values
        storage._set_trial(trial_id, trial)
    return True
