"""The data plane: from an audio tree to augmented segment pairs on the training device."""
