"""Training: the step, the schedule, the records and the checkpoints of a run."""

# Rank 0 writes the outcome of a run here, for whoever started the processes.
SUMMARY = "summary.json"
