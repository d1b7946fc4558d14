"""Searches over settings with Ray Tune: every trial is a whole training run of one or more ranks."""
