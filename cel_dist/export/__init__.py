"""Trained models as files for others: a model folder, an ONNX graph, a `torch.export` program."""

from cel_dist.export.export import FORMATS, Exported, Format, export_model

__all__ = ["FORMATS", "Exported", "Format", "export_model"]
