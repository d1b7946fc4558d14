"""What a rank takes of the processor."""

import logging
import os
import platform
import resource
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from training_runs import write_config

from cel_dist.config_file import load_config
from cel_dist.data.folder import ShardFolder
from cel_dist.distributed import World, let_idle_threads_sleep
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


def test_the_precision_is_remarked_on_where_the_processor_is_quicker_in_the_other(small_corpus, tmp_path, monkeypatch):
    fp32 = load_config(write_config(small_corpus, tmp_path))
    bf16 = load_config(write_config(small_corpus, tmp_path, "bf16", train={"precision": "bf16"}))

    def remarks(has_units):
        monkeypatch.setattr(processor, "has_bf16_units", lambda: has_units)
        assert processor.remark_on_precision(fp32, GPU) is None
        assert processor.remark_on_precision(bf16, GPU) is None
        return processor.remark_on_precision(fp32, CPU), processor.remark_on_precision(bf16, CPU)

    nothing, warning = remarks(has_units=False)
    assert nothing is None
    assert warning[0] == logging.WARNING
    assert "set train.precision=fp32" in warning[1]
    hint, nothing = remarks(has_units=True)
    assert hint[0] == logging.INFO
    assert "train.precision=bf16" in hint[1]
    assert nothing is None


FREES_AND_ALLOCATES = """
import resource, sys
import torch
from cel_dist.config_file import load_config
from cel_dist.distributed import World
from cel_dist.training.processor import settle

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

if sys.argv[1] == "settled":
    settle(load_config(sys.argv[2]), World())
for turn in range(22):
    # Small things that stay are put where the first of them were.
    if turn == 12:
        begin = faults()
    # 48 MiB: more than what glibc keeps by itself.
    torch.ones(12 * 2**20)
print(faults() - begin)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_memory_that_is_freed_is_used_again(small_corpus, tmp_path):
    config = write_config(small_corpus, tmp_path)

    def faults(way):
        command = [sys.executable, "-c", FREES_AND_ALLOCATES, way, str(config)]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    pages = 10 * 48 * 2**20 // resource.getpagesize()
    assert faults("plain") >= pages
    assert faults("settled") < pages / 100


def test_threads_that_wait_sleep_soon_unless_the_user_says_otherwise():
    environment = {}
    let_idle_threads_sleep(environment)
    assert int(environment["GOMP_SPINCOUNT"]) < 100_000
    for chosen in ({"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "7"}):
        environment = dict(chosen)
        let_idle_threads_sleep(environment)
        assert environment == chosen


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
