"""The embedded corpus: synthetic speakers, noises and rooms, made in seconds and without a network."""

SAMPLE_RATE_HZ = 16_000
"""Sample rate of everything in the corpus."""
