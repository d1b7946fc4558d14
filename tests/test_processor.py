"""What a rank takes of the processor."""

import os
from dataclasses import replace

import pytest
import torch
from training_runs import write_config

from cel_dist.config_file import load_config
from cel_dist.data.folder import ShardFolder
from cel_dist.distributed import World
from cel_dist.training import processor
from cel_dist.training.batches import num_readers

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system does not bind processes to cores")
def test_threads_are_an_equal_share_of_the_cores_that_the_process_may_use(small_corpus, tmp_path):
    config = load_config(write_config(small_corpus, tmp_path, train={"threads": None}))
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert processor.num_threads(config, World(0, 1, 0, 1)) == 1
    finally:
        os.sched_setaffinity(0, allowed)
    assert processor.num_threads(config, World(0, 1, 0, 1)) == len(allowed)
    assert processor.num_threads(config, World(0, 2, 0, 2)) == max(1, len(allowed) // 2)
    # More ranks than cores: one each.
    assert processor.num_threads(config, World(0, 99, 0, 99)) == 1
    chosen = load_config(write_config(small_corpus, tmp_path, "chosen", train={"threads": 3}))
    assert processor.num_threads(chosen, World(0, 2, 0, 2)) == 3


def test_bf16_is_remarked_on_where_the_processor_has_none(small_corpus, tmp_path, monkeypatch):
    fp32 = load_config(write_config(small_corpus, tmp_path))
    bf16 = load_config(write_config(small_corpus, tmp_path, "bf16", train={"precision": "bf16"}))
    for has_units in (False, True):
        monkeypatch.setattr(processor, "has_bf16_units", lambda has_units=has_units: has_units)
        assert processor.remark_on_precision(fp32, CPU) is None
        assert processor.remark_on_precision(bf16, GPU) is None
        remark = processor.remark_on_precision(bf16, CPU)
        assert (remark is None) == has_units
        assert has_units or "set train.precision=fp32" in remark


def test_readers_are_started_where_they_are_worth_it(small_corpus):
    shards = ShardFolder.open(small_corpus.shards)
    assert num_readers(None, shards, CPU) == 0
    assert num_readers(None, shards, GPU) == 1
    assert num_readers(2, shards, CPU) == 2
    assert num_readers(0, shards, GPU) == 0
    flac = shards.manifest.model_copy(update={"audio_format": "flac"})
    # A store answers late, and FLAC takes time to decode: both go on while the step is computed.
    assert num_readers(None, replace(shards, location="s3://bucket/shards"), CPU) == 1
    assert num_readers(None, replace(shards, manifest=flac), CPU) == 1
