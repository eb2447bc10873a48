"""A merge that is stopped, however and wherever, goes on to the same bytes."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import time
from multiprocessing import Value
from pathlib import Path

import pytest
import torch
import yaml
from configs import config_for
from conftest import weights_of
from processes import end_of, fork
from tqdm import tqdm
from transformers import PretrainedConfig

from mergekit_karcher import files
from mergekit_karcher.runner import driver, local, manifest, shards, work

SHARD_BYTES = "20K"
INDEX = "model.safetensors.index.json"


@pytest.fixture(autouse=True)
def one_thread():
    """What is forked from a process that has used OpenMP must keep to one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def models(three_models, tmp_path_factory):
    """Copies that a test may spoil, if it mends them."""
    folder = tmp_path_factory.mktemp("inputs")
    return [shutil.copytree(model, folder / Path(model).name) for model in three_models]


class Merging:
    """One merge, run again and again in processes of its own."""

    def __init__(self, folder, models, granularity="tensor"):
        self.config = folder / "config.yml"
        self.out = folder / "merged"
        self.log = folder / "log"
        self.merge_of(models, [1, 2, 3], granularity=granularity)

    def merge_of(self, models, weights, **settings):
        config = config_for([str(m) for m in models], weights, dtype="bfloat16", **settings)
        self.config.write_text(yaml.safe_dump(config))

    def start(self, *options, prepare=None):
        where = ["merge", self.config, self.out, "--out-shard-size", SHARD_BYTES]
        return fork([*where, *options], self.log, prepare)

    def run(self, *options, prepare=None):
        return end_of(self.start(*options, prepare=prepare))

    @property
    def said(self):
        return self.log.read_text()

    @property
    def files(self):
        return {
            str(path.relative_to(self.out)): path.read_bytes()
            for path in self.out.rglob("*")
            if path.is_file()
        }

    def loads(self):
        return (self.out / "config.json").exists()

    def error(self):
        """The one error of the last run."""
        assert "Traceback" not in self.said
        (line,) = [line for line in self.said.splitlines() if line.startswith("Error: ")]
        return line


@pytest.fixture
def merging(tmp_path, models):
    return Merging(tmp_path, models)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, models):
    """What a run that nothing stops leaves, by the granularity."""
    found = {}
    for granularity in ("tensor", "model"):
        once = Merging(tmp_path_factory.mktemp("once"), models, granularity=granularity)
        assert once.run() == 0, once.said
        found[granularity] = once.files
    return found


def killed_at(step, whom):
    """What kills a process, or its group, at that one of all the steps that it takes on disk.

    A step is giving a file its name, waiting for the disk, deleting, or writing a block.
    """
    taken = Value("i", 0)

    def prepare():
        driver_process = os.getpid()

        def counted(function):
            def stepping(*arguments, **options):
                with taken.get_lock():
                    taken.value += 1
                    now = taken.value == step
                if now and whom == "all":
                    os.killpg(driver_process, signal.SIGKILL)
                if now and os.getpid() != driver_process:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **options)

            return stepping

        for name in ("replace", "fsync", "unlink"):
            setattr(os, name, counted(getattr(os, name)))
        writer = shards.ShardWriter
        writer._write_all = counted(writer._write_all)

    return prepare, taken


@pytest.fixture(scope="module")
def steps(tmp_path_factory, models):
    """How many steps an undisturbed run takes."""
    prepare, taken = killed_at(0, "all")
    assert Merging(tmp_path_factory.mktemp("steps"), models).run(prepare=prepare) == 0
    return taken.value


def test_all_processes_may_be_killed_at_any_step(tmp_path, models, steps, undisturbed):
    assert steps > 50
    for step in (*range(1, steps - 12, 6), *range(steps - 12, steps + 1)):
        folder = tmp_path / str(step)
        folder.mkdir()
        merging = Merging(folder, models)
        prepare, _ = killed_at(step, "all")
        assert merging.run(prepare=prepare) == -signal.SIGKILL
        if merging.loads():
            assert (merging.out / "model.safetensors.index.json").exists()
            assert weights_of(merging.out).keys() == _names(undisturbed["tensor"])
        if not (merging.out / ".merge" / "whole").exists() and merging.loads():
            assert {n: c for n, c in merging.files.items() if ".merge" not in n} == (
                undisturbed["tensor"]
            )
            continue
        assert merging.run() == 0, (step, merging.said)
        assert merging.files == undisturbed["tensor"], step


def _names(files):
    return json.loads(files["model.safetensors.index.json"])["weight_map"].keys()


@pytest.mark.parametrize("granularity", ["tensor", "model"])
def test_a_worker_that_is_killed_is_replaced(tmp_path, models, steps, granularity, undisturbed):
    for step in range(steps // 4, steps // 2, 11):
        folder = tmp_path / str(step)
        folder.mkdir()
        merging = Merging(folder, models, granularity=granularity)
        prepare, _ = killed_at(step, "worker")
        assert merging.run("--workers", "2", prepare=prepare) == 0, merging.said
        assert merging.files == undisturbed[granularity]


@pytest.mark.parametrize("where", ["while it has the lock of progress bars", "at once"])
def test_a_worker_that_is_killed_in_a_bad_moment_is_replaced(merging, where, undisturbed):
    def prepare():
        unlucky = Value("i", 1)
        prepared, save = local._prepare, work._save

        def die():
            with unlucky.get_lock():
                dies, unlucky.value = unlucky.value, 0
            if dies:
                os.kill(os.getpid(), signal.SIGKILL)

        def holding(*arguments):
            tqdm.get_lock().acquire()
            die()
            tqdm.get_lock().release()
            return save(*arguments)

        def preparing(number):
            die()
            prepared(number)

        if where == "at once":
            local._prepare = preparing
            slow_submit(local)
        else:
            work._save = holding

    assert merging.run("--workers", "2", prepare=prepare) == 0, merging.said
    assert merging.files == undisturbed["tensor"]


def slow_submit(module):
    """Have the loss of a worker be seen before all units are handed out."""
    submit = module.LocalWorkers.submit

    def late(self, *arguments):
        future = submit(self, *arguments)
        time.sleep(0.1)
        return future

    module.LocalWorkers.submit = late


def test_workers_that_are_lost_again_and_again_stop_the_merge(merging, undisturbed):
    def prepare():
        work._save = lambda *_: os.kill(os.getpid(), signal.SIGKILL)

    assert merging.run(prepare=prepare) == 1
    assert "perhaps for want of memory" in merging.error()
    assert not merging.loads()
    assert merging.run() == 0
    assert merging.files == undisturbed["tensor"]


def test_what_is_done_is_verified_and_not_merged_again(merging, undisturbed):
    def prepare():
        store = work.store
        left = Value("i", 2)

        def twice(*arguments):
            store(*arguments)
            left.value -= 1
            if not left.value:
                os.killpg(os.getppid(), signal.SIGKILL)

        work.store = twice

    assert merging.run(prepare=prepare) == -signal.SIGKILL
    inner = merging.out / ".merge" / "merged"
    done = sorted((merging.out / ".merge").glob("model*.done"))
    kept, spoilt = done[0].stem, done[1].stem
    bytes_of = bytearray((inner / spoilt).read_bytes())
    bytes_of[-1] ^= 1
    (inner / spoilt).write_bytes(bytes_of)
    before = (inner / kept).stat().st_mtime_ns
    assert merging.run() == 0
    assert merging.files == undisturbed["tensor"]
    assert (merging.out / kept).stat().st_mtime_ns == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_it_with_a_sentence(merging, number, undisturbed):
    def prepare():
        # As in a terminal: what a shell starts in the background ignores it.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        save = work._save

        def slowly(*arguments):
            time.sleep(0.3)
            return save(*arguments)

        work._save = slowly

    process = merging.start(prepare=prepare)
    work_folder = merging.out / ".merge"
    while not list(work_folder.glob("*.done")):
        time.sleep(0.01)
    os.kill(process, number)
    assert end_of(process) == 1
    assert f"kept in {merging.out}: run the same command again to go on" in merging.error()
    assert not list(work_folder.rglob("*.partial"))
    assert not merging.loads()
    assert merging.run() == 0
    assert merging.files == undisturbed["tensor"]


@pytest.mark.parametrize(
    "name", ["manifest.json", "model-00002-of-00003.safetensors", "config.json", INDEX, "whole"]
)
def test_a_full_disk_stops_it_until_there_is_space(merging, name, undisturbed):
    def prepare():
        write, write_text = shards.ShardWriter._write_all, files.write_text

        def check(path):
            if Path(path).name.startswith(name):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def block(self, content):
            check(self._path)
            write(self, content)

        def text(path, content):
            check(path)
            write_text(path, content)

        def config(self, folder, **_):
            check(Path(folder, "config.json"))

        shards.ShardWriter._write_all = block
        manifest.write_text = driver.output.write_text = text
        if name == "config.json":
            PretrainedConfig.save_pretrained = config

    assert merging.run(prepare=prepare) == 1
    assert "is full: free some space, and run the same command again" in merging.error()
    assert not merging.loads()
    assert not list(merging.out.rglob("*.partial"))
    assert merging.run() == 0
    assert merging.files == undisturbed["tensor"]


def test_too_small_a_disk_is_seen_before_anything_is_merged(merging):
    def prepare():
        usage = shutil.disk_usage
        driver.output.shutil.disk_usage = lambda path: usage(path)._replace(free=1000)

    assert merging.run(prepare=prepare) == 1
    assert "has 1e-06 GB free, and the merge needs" in merging.error()
    assert not merging.out.exists() or not list(merging.out.rglob("*.safetensors"))


def test_an_input_that_is_cut_short_is_named(merging, models, undisturbed):
    path = sorted(models[1].glob("*.safetensors"))[0]
    content = path.read_bytes()
    try:
        path.write_bytes(content[:-10])
        assert merging.run() == 1
        assert str(path) in merging.error()
        assert f"is {len(content) - 10} bytes long and must be {len(content)}" in merging.error()
    finally:
        path.write_bytes(content)
    assert merging.run() == 0
    assert merging.files == undisturbed["tensor"]


def test_an_input_that_is_cut_short_while_it_is_read_is_named(tmp_path, models):
    spoilt = [shutil.copytree(model, tmp_path / model.name) for model in models]
    path = sorted(spoilt[1].glob("*.safetensors"))[-1]
    merging = Merging(tmp_path, spoilt)

    def prepare():
        save = work._save

        def cutting(*arguments):
            os.truncate(path, 4096)
            return save(*arguments)

        work._save = cutting

    assert merging.run(prepare=prepare) == 1
    assert str(path) in merging.error()
    assert "is 4096 bytes long and must be" in merging.error()
    assert not merging.loads()


def test_an_input_that_changes_between_runs_is_refused(tmp_path, models, undisturbed):
    changing = [shutil.copytree(model, tmp_path / model.name) for model in models]
    merging = Merging(tmp_path, changing)
    prepare, _ = killed_at(30, "all")
    merging.run(prepare=prepare)
    path = sorted(changing[0].glob("*.safetensors"))[0]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert merging.run() == 1
    assert "the input files differed" in merging.error()
    assert str(path) in merging.error()
    assert merging.run("--overwrite") == 0
    assert merging.files.keys() == undisturbed["tensor"].keys()
    assert merging.files != undisturbed["tensor"]


def test_an_input_that_changes_during_a_run_stops_it(tmp_path, models):
    changing = [shutil.copytree(model, tmp_path / model.name) for model in models]
    path = sorted(changing[0].glob("*.safetensors"))[0]
    merging = Merging(tmp_path, changing)

    def prepare():
        index = driver.check_inputs

        def late(manifest):
            os.utime(path)
            index(manifest)

        driver.check_inputs = late

    assert merging.run(prepare=prepare) == 1
    assert f"{path} has changed while it was merged" in merging.error()
    assert not merging.loads()


def test_nothing_is_kept_of_an_input_that_was_spoilt_for_a_while(tmp_path, models, undisturbed):
    kept, spoilt = models[0], shutil.copytree(models[0], tmp_path / models[0].name)
    merging = Merging(tmp_path, [spoilt, *models[1:]])

    def prepare():
        save = work._save

        def spoiling(*arguments):
            for path in spoilt.glob("*.safetensors"):
                with path.open("rb+") as file:
                    file.seek(-1, os.SEEK_END)
                    file.write(bytes([(kept / path.name).read_bytes()[-1] ^ 1]))
            return save(*arguments)

        work._save = spoiling

    assert merging.run(prepare=prepare) == 1
    assert "has changed while it was merged" in merging.error()
    for path in spoilt.iterdir():
        shutil.copy2(kept / path.name, path)
    assert merging.run() == 0
    assert merging.files.keys() == undisturbed["tensor"].keys()
    for name, content in undisturbed["tensor"].items():
        if name.endswith(".safetensors"):
            assert merging.files[name] == content


def test_another_config_in_the_same_folder_is_refused(merging, models, undisturbed):
    prepare, _ = killed_at(30, "all")
    merging.run(prepare=prepare)
    config = merging.config.read_text()
    merging.merge_of(models, [3, 2, 1])
    assert merging.run() == 1
    assert "the config differed" in merging.error()
    merging.config.write_text(config)
    assert merging.run() == 0
    assert merging.files == undisturbed["tensor"]


def test_a_run_waits_for_the_workers_of_one_that_was_killed(merging, tmp_path, undisturbed):
    events = tmp_path / "events"

    def note(event):
        with events.open("a") as file:
            file.write(f"{event}\n")

    def outliving():
        store = work.store
        local._end_with_parent = lambda: None

        def slowly(*arguments):
            note("begins")
            time.sleep(1.5)
            store(*arguments)
            note("ends")
            os._exit(0)

        work.store = slowly

    def noted():
        delete = driver.output.delete_partial

        def deleting(folder):
            note("next run")
            delete(folder)

        driver.output.delete_partial = deleting

    process = merging.start("--workers", "1", prepare=outliving)
    while not events.exists():
        time.sleep(0.01)
    os.kill(process, signal.SIGKILL)
    end_of(process)
    assert merging.run(prepare=noted) == 0, merging.said
    assert events.read_text().split("\n")[:3] == ["begins", "ends", "next run"]
    assert merging.files == undisturbed["tensor"]


def test_two_runs_in_one_folder_do_not_meet(merging, undisturbed):
    def prepare():
        publish = driver.output.publish

        def slowly(*arguments):
            time.sleep(6)
            publish(*arguments)

        driver.output.publish = slowly

    first = merging.start(prepare=prepare)
    while not (merging.out / ".merge" / "manifest.json").exists():
        time.sleep(0.01)
    log, merging.log = merging.log, merging.log.with_name("second")
    assert merging.run() == 1
    assert f"Another merge is writing to {merging.out}" in merging.error()
    merging.log = log
    assert end_of(first) == 0
    assert merging.files == undisturbed["tensor"]


def test_a_folder_with_something_in_it_is_left_alone(merging, undisturbed):
    merging.out.mkdir()
    for name in ("config.json", "model-00001-of-00009.safetensors", "notes.txt"):
        (merging.out / name).write_text("mine")
    before = merging.files
    assert merging.run() == 1
    assert "holds other files (config.json, model-00001-of-00009.safetensors" in merging.error()
    assert merging.files == before
    assert merging.run("--overwrite") == 0
    assert merging.files == undisturbed["tensor"] | {"notes.txt": b"mine"}
