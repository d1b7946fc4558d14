"""The benchmark of the data plane runs and reports every row; how fast, it does not say here."""

import json
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
SOURCES = ("shards, local", "shards, cached", "shards, HTTP, cache empty", "per item, files")


def test_the_data_benchmark_reports_every_way(tmp_path: Path) -> None:
    command = [sys.executable, PROJECT / "benchmarks/data.py", "--quick", "--results", tmp_path]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "data.json").read_text())
    rows = {(row["source"], row["audio_format"], row["output"]): row for row in report["table"]}
    formats = ("wav", "flac")
    assert set(rows) == {
        *((source, name, "int16") for source in ("local", "cache", "http", "files") for name in formats),
        *((source, name, "features") for source in ("local", "files") for name in formats),
    }
    for (source, name, output), row in rows.items():
        for figure in ("core_seconds", "seconds", "bytes_read", "import_seconds", "first_batch_seconds"):
            assert row[figure] > 0, (source, name, output, figure)
        assert (row["bytes_fetched"] > 0) == (source == "http")
    # Two segments of int16 and a header, not the member; decoding FLAC takes all of it.
    assert rows["local", "wav", "int16"]["bytes_read"] < 4 * 29_040 + 1000
    assert rows["cache", "wav", "int16"]["bytes_read"] < 4 * 29_040 + 1000
    assert rows["files", "wav", "int16"]["bytes_read"] > 0.9 * rows["files", "wav", "int16"]["member_bytes"]

    assert len(report["ratios"]) == 6
    assert all(0 < row["least"] <= row["median"] <= row["most"] for row in report["ratios"])
    assert report["stages"]["cpu"]["augmentation"] > 0
    assert report["stages"]["cpu"]["log_mel"] > 0

    page = (tmp_path / "data.md").read_text()
    for source in SOURCES:
        # Rates and first batches, of both formats.
        assert page.count(f"| {source} |") in (4, 8)
    assert str(tmp_path) not in page
