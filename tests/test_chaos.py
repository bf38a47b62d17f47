"""Full disks and killed commands: nothing finished is lost (CHAOS=20 pytest -m chaos -s)."""
import os, random, shutil, signal, subprocess, sys, time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import model
from support import UserError
from support.files import MARK
from support.films import write_video
from tests.helpers import (DAMAGES, REPO, add_negatives, checkpoint, contents, encode, metrics, run_training,
                           same_tensors)

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
        with pytest.raises(UserError, match=r"\A.*safetensors: cannot be written .*No space left.*\Z"):
            command()
        made = contents(disk / "cache")                    # whole or not at all
        assert made and made.items() < contents(cache).items()
        leave(512)
        command()
    assert contents(disk / "cache") == contents(cache)
    leave(0)
    with pytest.raises(UserError, match="a.mp4: cannot be written"):
        write_video(disk / "a.mp4", np.zeros((9, 32, 32, 3), np.uint8), 8)
    assert {p.name for p in disk.iterdir()} == {"ballast", "cache"}

@pytest.mark.parametrize("room, steps", [(0, 0), (0.45, 0), (1.5, 1), (2.06, 2)],
                         ids=["metrics", "first checkpoint", "second checkpoint", "export"])
def test_a_full_disk_keeps_a_run_whole(room, steps, straight, cache, small_disk):
    (disk, leave), run = small_disk, partial(run_training, cache=cache, steps=2, save_every=1)
    size = sum(file.stat().st_size for file in (straight / "checkpoints" / "step-000002").iterdir())
    leave(int(room * size / 1024))                         # room for so many checkpoints
    with pytest.raises(UserError, match=r"\A.* cannot be written .*\Z"):
        run(disk / "run")
    assert sorted(p.name for p in (disk / "run").rglob("step-*")) == [f"step-{i + 1:06d}" for i in range(steps)]
    (disk / "ballast").unlink()
    assert [line["loss"] for line in run(disk / "run")] == [line["loss"] for line in metrics(straight)[:2]]
    assert same_tensors(checkpoint(disk / "run", 2), checkpoint(straight, 2)) and model.load_dit(disk / "run")

STAGES = {                                                 # command: what a kill waits for, beside a random while
    "data.py --videos {videos} --model tiny --out cache": ["cache/win/.*"],
    "sample.py --data cache --model tiny --negatives 2 --steps 2 --guidance 1": ["cache/lose/.*"],
    "train.py --data cache --model tiny --out run --steps 6 --batch 4 --micro-batch 4 --save-every 1 --bench {bench}":
        [f"run/checkpoints/*{MARK}", f"run/*{MARK}", "run/metrics.jsonl", "run/videos/*/.*", "run/videos/*/*.mp4"],
}

def kill(process, folder, moment, delay):
    """SIGKILL, `delay` seconds after something like `moment` appears in the folder, unless the process ends before."""
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
    if file.name == "index.html":                          # drawn from metrics.jsonl, with the times
        return "there"
    return metrics(file.parent) if file.name == "metrics.jsonl" else file.read_bytes()

@pytest.mark.chaos
def test_killed_commands_end_with_the_files_of_undisturbed_ones(videos, shots, tmp_path):
    """Each is killed at random, beside a second one that was started in the same folder by mistake."""
    rng, calm, storm = random.Random(0), tmp_path / "calm", tmp_path / "storm"
    calm.mkdir()
    storm.mkdir()
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
        last = start(cwd=storm)
        assert last.communicate() and last.returncode == 0
    assert contents(storm, what_counts) == contents(calm, what_counts)

@pytest.mark.chaos
@pytest.mark.parametrize("what, errors", [("a damaged record", 1), ("SIGKILL", 0), ("no cache", 1)])
def test_where_one_rank_fails_it_says_why_and_the_others_end(what, errors, own_cache, tmp_path):
    data = tmp_path / "nowhere" if what == "no cache" else own_cache         # a mistake that both ranks find
    options = ["--model", "tiny", "--data", data, "--out", tmp_path / "run", "--batch", "4", "--steps", "5000"]
    with open(tmp_path / "output", "w") as output:
        torchrun = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
                                     "2", REPO / "train.py", *options], stdout=output, stderr=output)
    log = tmp_path / "run" / "metrics.jsonl"
    while torchrun.poll() is None and not (log.is_file() and log.read_text()):
        time.sleep(0.1)
    if what == "a damaged record":
        DAMAGES["cut short"](own_cache / "lose" / "00001.safetensors")
    if what == "SIGKILL":
        for rank in Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split():
            if b"\0RANK=1\0" in Path(f"/proc/{rank}/environ").read_bytes():
                os.kill(int(rank), signal.SIGKILL)
    assert torchrun.wait(timeout=60) == 1
    printed = (tmp_path / "output").read_text()
    assert printed.count("error: ") == errors and printed.count("Traceback") == 1, printed           # torchrun's own
