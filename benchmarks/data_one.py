"""Measures ways of `benchmarks/data.py` in the process it is started in, and prints what it found.

Both are read and printed as JSON. The time of the imports is the process's own only if there is one way.
"""

import json
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path


def main() -> None:
    job = json.loads(sys.argv[1])
    begin = time.perf_counter()
    import torch
    from data_corpus import Corpus
    from data_ways import Places, Way, measure

    ways = [Way(*way) for way in job["ways"]]
    if any(way.is_per_item for way in ways):
        import per_item  # noqa: F401 (what it imports belongs to the approach)
    imports = time.perf_counter() - begin
    torch.set_num_threads(1)
    corpus = Corpus(Path(job["folder"]), job["utterances"])
    places = Places(corpus, job["url"], Path(job["cache"]))
    found = []
    for way in ways:
        # A shard of the next epoch may still be on its way into it; what that leaves behind goes with the corpus.
        with tempfile.TemporaryDirectory(dir=corpus.folder, ignore_cleanup_errors=True) as empty:
            here = replace(places, cache=Path(empty)) if way.source == "http" else places
            found.append(asdict(measure(way, here, job["batch_size"], job["seconds"], imports)))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
