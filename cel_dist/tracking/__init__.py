"""MLflow: runs, the models they produced, and the way back from a registered model to its folder.

The only room that imports mlflow, and it does so late: importing this package is cheap.
"""

from cel_dist.tracking.connection import DEFAULT_URI, resolve_uri
from cel_dist.tracking.registry import fetch_model
from cel_dist.tracking.run import RUN_ID_FILE, UNSENT_FILE, Tracker

__all__ = ["DEFAULT_URI", "RUN_ID_FILE", "UNSENT_FILE", "Tracker", "fetch_model", "resolve_uri"]
