"""`cel encoders`."""

from typing import Annotated, Any

import typer

from cel_dist.cli.app import JsonOption, app, emit
from cel_dist.errors import CelError

# 2 s.
_NUM_FRAMES = 200
_MELS = (40, 80)


@app.command(epilog="Example: cel encoders --mels 80 --embedding-dim 192")
def encoders(
    embedding_dim: Annotated[int, typer.Option(help="Size of the embedding.")] = 512,
    mels: Annotated[int, typer.Option(help="Mel bands of the features: 40 or 80.")] = 40,
    pooling: Annotated[
        str, typer.Option(help="tap, sap, stats or asp; default: that of each encoder's paper.")
    ] = "default",
    as_json: JsonOption = False,
) -> None:
    """List the encoders: where each is from, its pooling, its size, and the work for 2 s of speech.

    Multiply-adds are those of convolutions and matrix products, one multiplication and its addition counted as one.
    """
    from cel_dist.encoders import encoder_names, find_encoder
    from cel_dist.encoders.cost import encoder_cost

    if mels not in _MELS:
        raise CelError(f"--mels {mels}: features have 40 or 80 mel bands; give one of these")
    rows: list[dict[str, Any]] = []
    for name in encoder_names():
        registered = find_encoder(name)
        cost = encoder_cost(name, embedding_dim, pooling=pooling, num_mels=mels, num_frames=_NUM_FRAMES)
        rows.append(
            {
                "name": name,
                "source": registered.source,
                "pooling": registered.pooling if pooling == "default" else pooling,
                "default_pooling": registered.pooling,
                "parameters": cost.parameters,
                "multiply_adds": cost.multiply_adds,
            }
        )
    summary = {
        "embedding_dim": embedding_dim,
        "num_mels": mels,
        "frames": _NUM_FRAMES,
        "encoders": rows,
    }
    emit(summary, "\n".join(_lines(rows, summary)), as_json=as_json)


def _lines(rows: list[dict[str, Any]], summary: dict[str, Any]) -> list[str]:
    table = [("name", "parameters", "multiply-adds", "pooling", "source")]
    for row in rows:
        parameters, work = f"{row['parameters'] / 1e6:.2f} M", f"{row['multiply_adds'] / 1e9:.2f} G"
        table.append((row["name"], parameters, work, row["pooling"], row["source"]))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table]
    lines.append(
        f"with {summary['num_mels']} mel bands and embeddings of {summary['embedding_dim']} dimensions; multiply-adds "
        f"of {summary['frames']} frames (2 s)"
    )
    return lines
