"""What a user can get wrong: each mistake ends in one line that names the file or the option."""
import re, shutil, subprocess, sys

import pytest
import torch

from support import folders
from support.command import flags
from tests.helpers import DAMAGES, REPO, SHORT, contents, on_rank, refusal, rewrite_records
from toy import world

pytest_plugins = "tests.helpers"

@pytest.fixture(scope="session")
def bad(videos, cache, shots, tmp_path_factory):
    """A folder of everything that is wrong."""
    bad, clip = tmp_path_factory.mktemp("bad"), (videos / "00000.mp4").read_bytes()
    files = {"empty/a.txt": b"a", "no-caption/a.mp4": clip, "pictures/a.png": b"not a picture", "pictures/a.txt": b"a",
             "cut/a.mp4": clip[:len(clip) // 2], "cut/a.txt": b"a", "gone/metadata.csv": b"file_name,text\ngone.png,a"}
    for name, content in files.items():
        (bad / name).parent.mkdir(exist_ok=True)
        (bad / name).write_bytes(content)
    (shutil.copytree(shots, bad / "recaptioned") / "walk-12.txt").write_text("another caption")
    world.write_toy_videos(bad / "short", 1, seed=0, frames=5)
    shutil.copytree(folders.TINY, bad / "headless", ignore=shutil.ignore_patterns("transformer"))
    shutil.copytree(cache, bad / "no-negatives", ignore=shutil.ignore_patterns("lose"))
    for name in ("mixed", "unequal", "old"):
        shutil.copytree(cache, bad / name)
    rewrite_records([bad / "mixed" / "win" / "00002.safetensors"], made_by="something else")
    rewrite_records((bad / "unequal" / "lose").iterdir(), win="another")
    (bad / "old" / "win" / "made_by.json").write_text('{"format": 1}')
    (bad / "foreign" / "transformer").mkdir(parents=True)
    return bad

# Command line: what its one line says. {same} stands for the options of the run {half}.
REFUSED = {
    "data --videos {bad}/nowhere": ["{bad}/nowhere", "no videos"],
    "data": ["--videos"],
    "data --videos {bad}/empty": ["{bad}/empty", "no videos", "a.txt"],
    "data --videos {bad}/no-caption": ["a.mp4: has no caption", "a.txt"],
    "data --videos {bad}/cut": ["cut/a.mp4"],
    "data --videos {bad}/short": ["00000.mp4", "lasts 0.62 s, but 17 frames at 8 fps from 0 s on need 2.00 s"],
    "data --videos {videos} --frames 16": ["--frames 16", "8k + 1"],
    "data --videos {videos} --frames 25": ["--frames 25", "at most 17"],         # this model's learned positions
    "data --videos {videos} --given-negatives": ["{videos}: has no videos in negative_samples/"],
    "data --videos {videos} --model {bad}/headless": ["headless", "transformer/"],
    "data --videos {videos} --out {cache} --frames 9": ["{cache}/win", "frames 17 (now 9)"],
    "data --videos {videos} --out {bad}/old": ["{bad}/old/win", "version None (now 2)"],
    "data --videos {videos} --out {bad}/cut/a.txt": ["{bad}/cut/a.txt", "cannot be written"],
    "data --videos {videos} --frame 17": ["--frame", "--frames", "--skip-bad"],
    "sample": ["--data", "--image", "--bench"],
    "sample --data {cache} --image {picture}": ["give one of", "--data"],
    "sample --data {cache} --steps 3 --negatives 2 --guidance 1": ["{cache}/lose", "steps 2 (now 3)"],
    "sample --data {cache} --model {half} --steps 2 --negatives 2 --guidance 1": ["{cache}/lose", "transformer "],
    "sample --data {cache} --prompt a": ["--prompt a", "no effect", "--data"],
    "sample --data {bad}/empty": ["{bad}/empty: holds no records", "data.py"],
    "sample --image {picture} --out {tmp}/a.avi": ["a.avi", ".mp4"],
    "sample --image {bad}/pictures/a.png --out {tmp}/a.mp4": ["a.png"],
    "sample --bench {bad}/nowhere": ["{bad}/nowhere", "no pictures"],
    "sample --bench {bad}/pictures --out {tmp}": ["pictures/a.png", "picture"],
    "sample --bench {bad}/gone": ["gone.png is not there"],
    "sample --bench {bad}/recaptioned --out {methods}/alpha-method": ["alpha-method", "was made with "],
    "train --data {bad}/nowhere": ["{bad}/nowhere: holds no records", "data.py", "sample.py"],
    "train --data {bad}/no-negatives": ["lose/00000.safetensors", "sample.py"],
    "train --data {bad}/mixed": ["win/00002.safetensors", "other settings or shapes than the other records"],
    "train --data {bad}/unequal": ["{bad}/unequal/lose/00000", "another encoding of its clip"],
    "train --data {cache} --bench {bad}/gone": ["gone.png is not there"],
    "train --data {cache} --out {bad}/foreign": ["{bad}/foreign/transformer", "--out"],
    "train --data {cache} --out {half} {same} --lr 3e-4": ["{half}", "lr 0.0001 (now 0.0003)"],
    "train --data {cache} --resume {half}": ["--resume {half}", "no checkpoint", "{half}/checkpoints/step-000002"],
    "train --data {cache} --method dpo": ["scores.json", "expected"],
    "train --data {cache} --method grpo": ["--method", "grpo", "sft"],
    "train --data {cache} --lose-per-step 3": ["--lose-per-step 3", "needs 3 negatives", "{cache} have 2"],
    "train --data {cache} --compare-every 4 --anchor 0": ["--anchor 0", "--compare-every 1"],
    "train --bench {bad}/gone": ["--bench {bad}/gone", "--data"],        # on the toy world
    "train --dry-run 3": ["--dry-run", "--model zai-org/CogVideoX-5b-I2V"],
    "train --dry-run 3 --model zai-org/CogVideoX-5b-I2V": ["--dry-run 3", "--batch 8"],
}

@pytest.mark.parametrize("line, words", REFUSED.items(), ids=REFUSED)
def test_a_mistake_ends_in_one_line(line, words, bad, videos, cache, half, picture, methods, tmp_path, monkeypatch):
    places = dict(bad=bad, videos=videos, cache=cache, half=half, picture=picture, methods=methods, tmp=tmp_path,
                  same=flags(SHORT | dict(steps=2)))
    before = contents(bad), contents(half)
    name, *arguments = line.format(**places).split()
    defaults = ["--model", "tiny"]
    if name != "sample":
        defaults += ["--out", str(tmp_path / "out")]
    message = refusal(monkeypatch, name, *defaults, *arguments)              # of an option given twice the second wins
    assert all(word.format(**places) in message for word in words), message
    assert (contents(bad), contents(half)) == before

def test_a_mistake_is_one_line_on_stderr_and_status_1(tmp_path):
    command = [sys.executable, REPO / "train.py", "--data", "nowhere"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert re.fullmatch(r"error: nowhere: .*\n", done.stderr) and done.returncode == 1
    assert re.fullmatch(r"model: tiny \(.*\)\noptions: .*\n", done.stdout)

def test_an_incomplete_launcher_is_refused(videos, cache, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    for command in (f"data --videos {videos}", f"sample --data {cache}", f"train --data {cache}"):
        words = "the environment has WORLD_SIZE, but not all of RANK, WORLD_SIZE, LOCAL_RANK"
        assert words in refusal(monkeypatch, *command.split(), "--model", "tiny")

def test_more_processes_than_gpus_are_refused(cache, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    on_rank(monkeypatch, 0, 4)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert "this machine has 2" in refusal(monkeypatch, "sample", "--model", "tiny", "--data", str(cache))

@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", ["win", "lose", "checkpoint", "checkpoint.json", "run.json"])
def test_a_damaged_file_is_refused_by_name(kind, damage, own_cache, half, tmp_path, monkeypatch):
    if kind.endswith(".json") and "head" in damage or kind != "checkpoint" and "shards" in damage:
        pytest.skip("has none")
    run, step = shutil.copytree(half, tmp_path / "run"), tmp_path / "run" / "checkpoints" / "step-000002"
    files = {"checkpoint": next(step.glob("*.safetensors")), "checkpoint.json": step / kind, "run.json": run / kind}
    file = files.get(kind, own_cache / kind / "00001.safetensors")
    DAMAGES[damage](file)
    arguments = flags(SHORT | dict(data=own_cache, out=run)).split()         # four steps: two more
    assert str(file) in refusal(monkeypatch, "train", *arguments)
