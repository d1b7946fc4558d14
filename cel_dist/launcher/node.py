"""`python -m cel_dist.launcher.node ARGUMENTS` is DeepSpeed's launcher of one node, with the same arguments."""

from cel_dist.imports import hidden


def main() -> None:
    """Start the ranks of this node and wait for them; ends the process with the code of the first one that fails."""
    # DeepSpeed's autotuner, which is not used, imports mlflow where it can: two seconds of every start.
    with hidden("mlflow"):
        from deepspeed.launcher.launch import main as launch
    launch()


if __name__ == "__main__":
    main()
