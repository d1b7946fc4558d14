"""Speaker embeddings from unlabelled speech: contrastive equilibrium learning (Mun et al. 2020) on many nodes.

Importing this package is light: torch, deepspeed and mlflow are loaded by the parts that need them.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "load_model"]

if TYPE_CHECKING:
    from cel_dist.model import load_model


def __getattr__(name: str) -> Any:
    if name == "load_model":
        from cel_dist.model import load_model

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
