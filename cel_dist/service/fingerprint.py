"""Which model an embedding is of."""

import hashlib
import json

import torch

from cel_dist.model import SpeakerModel


def fingerprint(model: SpeakerModel) -> str:
    """SHA-256 in hexadecimal of what makes an embedding: front end, architecture and weights.

    Back end, threshold and calibration are left out: they compare embeddings and do not change them, so that a store
    outlives a new calibration.
    """
    description = model.description.model_dump(mode="json", include={"encoder", "features"})
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    for name, tensor in sorted(model.encoder.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
