"""Enrolled people: a store of their embeddings, verification and identification, and the HTTP service around them."""

from cel_dist.service.fingerprint import fingerprint
from cel_dist.service.speakers import Candidate, Identification, Speakers
from cel_dist.service.store import Person, SpeakerStore

__all__ = ["Candidate", "Identification", "Person", "SpeakerStore", "Speakers", "fingerprint"]
