"""Training: the step, the schedule, the records and the checkpoints of a run."""
