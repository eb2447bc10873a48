"""`mergekit-karcher merge --ray` on a cluster of two nodes, of which one is lost."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import yaml
from configs import config_for
from ray.cluster_utils import Cluster

from mergekit_karcher.errors import KarcherError
from mergekit_karcher.runner.cluster import RayWorkers

_OURS = "from mergekit_karcher.cli.main import main; main()"


@pytest.fixture
def cluster():
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    nodes.add_node(num_cpus=1)
    nodes.wait_for_nodes()
    yield nodes
    nodes.shutdown()


def merge(config, out, *options):
    """Start our command with one thread a worker and a tensor a shard."""
    path = out.with_suffix(".yml")
    path.write_text(yaml.safe_dump(config))
    command = ["merge", path, out, "--out-shard-size", "1", "--num-threads", "1", *options]
    return subprocess.Popen(
        [sys.executable, "-c", _OURS, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def files_of(out):
    return {path.name: path.read_bytes() for path in out.glob("*.safetensors*")}


def test_a_node_that_is_lost_is_done_without(cluster, three_models, tmp_path):
    config = config_for(three_models, [1, 2, 3], granularity="model")
    alone = merge(config, tmp_path / "alone")
    out = tmp_path / "merged"
    running = merge(config, out, "--ray", cluster.address)
    stop = time.monotonic() + 120
    while not list(out.glob(".merge/products-*.done")) and time.monotonic() < stop:
        time.sleep(0.01)
    cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
    said, _ = running.communicate(timeout=240)
    assert running.returncode == 0, said
    assert "30 tensors merged" in said
    assert alone.wait(240) == 0, alone.stdout.read()
    assert files_of(out) == files_of(tmp_path / "alone")
    assert len(files_of(out)) == 31


def test_no_cluster_at_the_address_is_one_sentence():
    with pytest.raises(KarcherError, match=r"There is no Ray cluster at 127\.0\.0\.1:1"):
        RayWorkers(None, "127.0.0.1:1")
