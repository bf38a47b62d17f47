"""Full disks and killed commands: nothing finished is lost (CHAOS=20 pytest -m chaos -s)."""
import os, random, shutil, signal, subprocess, sys, time
from functools import partial
from pathlib import Path

from tests.helpers import (DAMAGES, REPO, add_negatives, checkpoint, contents, encode, metrics, run_training,
                           same_tensors)

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import data
import model
from model import UserError

pytest_plugins = "tests.helpers"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 MiB, and a function that leaves so many KiB of it free."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("may not mount a small file system here")

    def leave(kib):
        (disk / "ballast").unlink(missing_ok=True)
        (disk / "ballast").write_bytes(bytes(shutil.disk_usage(disk).free - 1024 * kib))

    yield disk, leave
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_full_disk_keeps_records_and_videos_whole(videos, cache, small_disk):
    disk, leave = small_disk
    stages = (partial(encode, videos, disk / "cache"), 32), (partial(add_negatives, disk / "cache"), 40)
    for command, kib in stages:
        leave(kib)
        with pytest.raises(UserError, match=r"safetensors: cannot be written .*No space left") as stopped:
            command()
        assert "\n" not in str(stopped.value)
        made = contents(disk / "cache")                    # whole or not at all
        assert made and made.items() < contents(cache).items()
        leave(512)
        command()
    assert contents(disk / "cache") == contents(cache)
    leave(0)
    with pytest.raises(UserError, match="a.mp4: cannot be written"):
        data.write_video(disk / "a.mp4", np.zeros((9, 32, 32, 3), np.uint8), 8)
    assert {p.name for p in disk.iterdir()} == {"ballast", "cache"}


@pytest.mark.parametrize("room, steps", [(0, 0), (0.45, 0), (1.5, 1), (2.06, 2)],
                         ids=["metrics", "first checkpoint", "second checkpoint", "export"])
def test_a_full_disk_keeps_a_run_whole(room, steps, straight, cache, small_disk):
    (disk, leave), run = small_disk, partial(run_training, cache=cache, steps=2, save_every=1)
    size = sum(file.stat().st_size for file in (straight / "checkpoints" / "step-000002").iterdir())
    leave(int(room * size / 1024))                         # room for so many checkpoints
    with pytest.raises(UserError, match="cannot be written") as stopped:
        run(disk / "run")
    assert "\n" not in str(stopped.value)
    assert sorted(p.name for p in (disk / "run").rglob("step-*")) == [f"step-{i + 1:06d}" for i in range(steps)]
    (disk / "ballast").unlink()
    assert [line["loss"] for line in run(disk / "run")] == [line["loss"] for line in metrics(straight)[:2]]
    assert same_tensors(checkpoint(disk / "run", 2), checkpoint(straight, 2)) and model.load_dit(disk / "run")


STAGES = {                                                 # command: what a kill waits for, beside a random while
    "data.py --videos {videos} --model tiny --out cache": ["cache/win/.*"],
    "sample.py --data cache --model tiny --negatives 2 --steps 2 --guidance 1": ["cache/lose/.*"],
    "train.py --data cache --model tiny --out run --steps 6 --batch 4 --micro-batch 4 --save-every 1 --bench {bench}":
        ["run/checkpoints/*.part", "run/*.part", "run/metrics.jsonl", "run/videos/*/.*", "run/videos/*/*.mp4"],
}


def kill(process, folder, moment, delay):
    """SIGKILL `delay` seconds after something like `moment` appears in the folder, unless the process is done by
    then."""
    while moment and process.poll() is None and not any(folder.glob(moment)):
        time.sleep(0.001)
    try:
        process.wait(delay)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def what_counts(file):
    """A file's bytes, without what differs between any two runs: the times of steps, and the order of a header."""
    if file.suffix == ".safetensors":
        return {k: v.view(torch.uint8).numpy().tobytes() for k, v in load_file(file).items()}
    return metrics(file.parent) if file.name == "metrics.jsonl" else file.read_bytes()


@pytest.mark.chaos
def test_killed_commands_end_with_the_files_of_undisturbed_ones(videos, shots, tmp_path):
    """Each is killed at random, beside a second one that was started in the same folder by mistake."""
    rng, calm, storm = random.Random(0), tmp_path / "calm", tmp_path / "storm"
    calm.mkdir()
    storm.mkdir()
    refused = 0
    for command, moments in STAGES.items():
        name, *arguments = command.format(videos=videos, bench=shots).split()
        start = partial(subprocess.Popen, [sys.executable, REPO / name, *arguments], text=True,
                        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        begin = time.time()
        assert start(cwd=calm).wait() == 0
        seconds = time.time() - begin
        for _ in range(int(os.environ.get("CHAOS", 2))):
            moment = rng.choice([None, *moments])
            first, second = start(cwd=storm), start(cwd=storm)
            kill(first, storm, moment, rng.uniform(0, 0.1) if moment else rng.uniform(0.3, 1) * seconds)
            kill(second, storm, None, rng.uniform(0, 0.5) * seconds)
            for process in (first, second):
                said = process.stderr.read()
                assert process.returncode in (0, -signal.SIGKILL) or "is at work there" in said, said
                refused += process.returncode == 1
        last = start(cwd=storm)
        assert last.communicate() and last.returncode == 0
    print(f"{refused} of the second ones were refused")
    ours, theirs = (contents(folder, what_counts) for folder in (storm, calm))
    assert ours == theirs


FAILURES = {                                               # of one rank of two: how often "error: " is printed
    "a damaged record": (lambda cache, rank: DAMAGES["cut short"](cache / "lose" / "00001.safetensors"), 1),
    "SIGKILL": (lambda cache, rank: os.kill(rank, signal.SIGKILL), 0),
    "no cache at all": (None, 1),                          # a mistake that both ranks find
}


@pytest.mark.chaos
@pytest.mark.parametrize("what", FAILURES)
def test_where_one_rank_fails_it_says_why_and_the_others_end(what, own_cache, tmp_path):
    fail, errors = FAILURES[what]
    arguments = ["--model", "tiny", "--data", own_cache if fail else tmp_path / "nowhere", "--out", tmp_path / "run",
                 "--batch", "4", "--steps", "5000"]
    with open(tmp_path / "output", "w") as output:
        torchrun = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
                                     "2", REPO / "train.py", *arguments], stdout=output, stderr=output)
    if fail:
        log = tmp_path / "run" / "metrics.jsonl"
        while torchrun.poll() is None and not (log.is_file() and log.read_text()):
            time.sleep(0.1)
        for rank in Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split():
            if b"\0RANK=1\0" in Path(f"/proc/{rank}/environ").read_bytes():
                fail(own_cache, int(rank))
    begin = time.time()
    assert torchrun.wait(timeout=60) == 1
    print(f"{what}: all ended after {time.time() - begin:.1f} s")
    printed = (tmp_path / "output").read_text()
    assert printed.count("error: ") == errors, printed
    assert printed.count("Traceback") == 1, printed        # torchrun's own
