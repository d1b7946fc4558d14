"""Ray's own record of a search: whether one can be gone on from.

Ray copies its files there every few seconds, one after the other and not atomically. Where it cannot read them it
begins anew.
"""

import json
import logging
import pickle
from pathlib import Path
from typing import Any

from cel_dist.sweep.section import SweepSection

logger = logging.getLogger(__name__)


def is_sound(folder: Path, section: SweepSection) -> bool:
    """Whether the newest files in `folder` are whole and know the same trials.

    Args:
        folder: that Ray Tune writes its record into.
        section: the search that it is of.
    """
    if not any(folder.glob("experiment_state-*.json")):
        return False
    try:
        known = {json.loads(trial)["trial_id"] for trial, _ in _newest_json(folder)["trial_data"]}
        for _ in folder.glob("callback-states-*.pkl"):
            _newest_pickle(folder, "callback-states-*.pkl")
        if section.search == "tpe":
            drawn = set(_newest_pickle(folder, "searcher-state-*.pkl")["_ot_trials"])
            num_drawn = _newest_pickle(folder, "search_gen_state-*.json")["counter"]
        else:
            state = _newest_pickle(folder, "basic-variant-state-*.json")
            drawn, num_drawn = known, sum(iterator.counter for iterator in state["_iterators"])
    except Exception as error:  # whatever unpickling half a file may raise
        logger.warning("Ray's record in %s is damaged (%s); the search goes on from trials.json", folder, error)
        return False
    return bool(known) and drawn == known and num_drawn == len(known)


def _newest_json(folder: Path) -> Any:
    return json.loads(max(folder.glob("experiment_state-*.json")).read_bytes())


def _newest_pickle(folder: Path, pattern: str) -> Any:
    return pickle.loads(max(folder.glob(pattern)).read_bytes())
