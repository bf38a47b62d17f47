"""What a user can get wrong: each mistake ends in one line that names the file or the option."""
import json, re, shutil, subprocess, sys

from tests.helpers import DAMAGES, REPO, contents, refusal, rewrite_records

import pytest
import torch

import model
from toy import world

pytest_plugins = "tests.helpers"


@pytest.fixture(scope="session")
def bad(videos, cache, shots, tmp_path_factory):
    """A folder of everything that is wrong."""
    bad, clip = tmp_path_factory.mktemp("bad"), (videos / "00000.mp4").read_bytes()
    folders = {"empty": {"a.txt": b"a"},
               "no-caption": {"a.mp4": clip},
               "cut": {"a.mp4": clip[:len(clip) // 2], "a.txt": b"a"},
               "text": {"a.mp4": b"not a video", "a.txt": b"a"},
               "pictures": {"a.png": b"not a picture"}}
    for name, files in folders.items():
        (bad / name).mkdir()
        for file, content in files.items():
            (bad / name / file).write_bytes(content)
    (shutil.copytree(shots, bad / "recaptioned") / "walk-12.txt").write_text("another caption")
    shutil.copytree(shots, bad / "clash")
    for name in ("walk.png", "walk.txt"):
        shutil.copy(shots / name.replace("walk", "walk-12"), bad / "clash" / name)
    for name, files in {"gone": ["walk-12.png", "gone.png"], "twice": ["walk-12.png", "somersault.png"]}.items():
        rows = [json.dumps(dict(file_name=file, text="a", name=name)) for file in files]
        (shutil.copytree(shots, bad / name) / "metadata.jsonl").write_text("\n".join(rows))
    world.write_toy_videos(bad / "short", 1, seed=0, frames=5)
    shutil.copytree(model.TINY, bad / "headless", ignore=shutil.ignore_patterns("transformer"))
    for name in ("no-negatives", "mixed", "channels", "unequal"):
        shutil.copytree(cache, bad / name, ignore=shutil.ignore_patterns("lose" if name == "no-negatives" else ""))
    rewrite_records([bad / "mixed" / "win" / "00002.safetensors"], seed=1)
    rewrite_records((bad / "channels").glob("*/*"), lambda latents: torch.cat([latents, latents], dim=-4))
    rewrite_records((bad / "unequal" / "lose").iterdir(), lambda latents: latents[..., :4])
    return bad


REFUSED = {                                                # command line: what its one line says
    "data --videos {bad}/nowhere": ["{bad}/nowhere", "No such file or directory"],
    "data": ["--videos"],
    "data --videos {bad}/empty": ["{bad}/empty", "no videos", "a.txt"],
    "data --videos {bad}/no-caption": ["a.mp4: has no caption", "a.txt"],
    "data --videos {bad}/cut": ["cut/a.mp4"],
    "data --videos {bad}/text": ["text/a.mp4"],
    "data --videos {bad}/short": ["00000.mp4", "lasts 0.62 s, but 17 frames at 8 fps need 2.00 s"],
    "data --videos {videos} --frames 16": ["--frames 16", "8k + 1"],
    "data --videos {videos} --given-negatives": ["{videos}: has no videos in negative_samples/"],
    "data --videos {videos} --height 30": ["--height 30", "8"],
    "data --videos {videos} --width 48": ["--width 48", "32"],         # this model's learned positions: 32 × 32 only
    "data --videos {videos} --fps 0": ["--fps 0"],
    "data --videos {videos} --model {bad}/headless": ["headless", "transformer/"],
    "data --videos {videos} --model {bad}/nowhere": ["nowhere", "no such model folder"],
    "data --videos {videos} --out {cache} --frames 9": ["00000.safetensors", "frames 17 (now 9)"],
    "data --videos {videos} --frame 17": ["--frame", "--frames", "--image-noise", "--skip-bad"],
    "data --videos {videos} --frames many": ["--frames", "many"],
    "sample --data {cache} --steps 3 --negatives 2 --guidance 1": ["lose/made_by.json", "steps 2 (now 3)"],
    "sample --data {cache} --model {half} --steps 2 --negatives 2 --guidance 1": ["lose/made_by.json", "transformer "],
    "sample --data {bad}/empty": ["--data {bad}/empty", "no records"],
    "sample --data {bad}/no-negatives --solver heun": ["--solver", "heun", "multistep"],
    "sample": ["--data", "--image", "--bench"],
    "sample --data {cache} --image {picture}": ["give one of", "--data"],
    "sample --image {picture} --samples -1": ["--samples -1"],
    "sample --bench {bad}/nowhere": ["{bad}/nowhere", "cannot be read"],
    "sample --bench {bad}/pictures": ["a.png", "no caption"],
    "sample --bench {bad}/gone": ["gone.png is not there"],
    "sample --bench {bad}/twice": ["is named twice"],
    "sample --bench {bad}/clash": ["is named walk-12", "of its own"],
    "sample --bench {videos} --out {tmp}": ["00000.mp4: cannot be read as a picture"],
    "sample --bench {bad}/recaptioned --out {methods}/alpha-method": ["bench.json", "bench ", "use another folder"],
    "sample --image {bad}/pictures/a.png --out {tmp}/a.mp4": ["a.png"],
    "sample --image {bad}/nowhere.png --out {tmp}/a.mp4": ["nowhere.png"],
    "sample --image {picture} --out {tmp}/a.avi": ["a.avi", ".mp4"],
    "sample --image {picture} --out {tmp}/a.mp4 --height 48": ["--height 48", "32"],
    "train --data {bad}/nowhere --model {tiny}": ["--data {bad}/nowhere", "data.py", "sample.py"],
    "train --data {bad}/no-negatives": ["lose/00000.safetensors", "sample.py"],
    "train --data {bad}/mixed": ["win/00002.safetensors", "seed 1 (other records: 0)"],
    "train --data {bad}/channels": ["{bad}/channels", "16"],
    "train --data {bad}/unequal": ["{bad}/unequal/lose/00000", "another encoding of its clip"],
    "train --data {cache} --batch 4 --micro-batch 0": ["--micro-batch 0", "at least 1"],
    "train --data {cache} --batch 0": ["--batch 0"],
    "train --data {cache} --method dpo": ["scores.json", "expected"],
    "train --data {cache} --method grpo": ["--method", "grpo", "sft"],
    "train --data {cache} --t-draw low-noise": ["--t-draw", "low-noise", "release"],
    "train --data {cache} --decay 1.5": ["--decay 1.5", "0 to 1"],
    "train --data {cache} --compare-every 0": ["--compare-every 0", "at least 1"],
    "train --data {cache} --compare-every 4 --anchor 0": ["--compare-every 4", "--anchor"],
    "train --data {cache} --eval-data {bad}/no-negatives": ["lose/00000.safetensors"],
    "train --data {cache} --eval-data {bad}/empty": ["{bad}/empty: holds no records"],
    "data --videos {videos} --out {bad}/text/a.txt": ["{bad}/text/a.txt", "cannot be written"],
    "train --data {cache} --resume {bad}/nowhere": ["{bad}/nowhere/options.json: cannot be read", "No such file"],
    "train --data {cache} --out {half} --batch 4 --warmup 1 --lr 3e-4": ["step-000002", "--lr 0.0001 (now 0.0003)"],
    "train --data {cache} --epochs -1": ["--epochs -1", "at least 0"],
    "train --dry-run 2 --batch 3": ["--batch 3"],
    "train --dry-run 8 --batch 0": ["--batch 0", "at least 1"],
    "train --dry-run 0": ["--dry-run 0", "2x8"],
    "train --dry-run 2 x8": ["--dry-run x8", "2x8"],
    "train --data {cache} --batch 4 --micro-batch 3": ["--micro-batch 3", "does not divide the 4 samples", "--batch 4"],
    "train --data {cache} --steps 3 --epochs 2": ["--epochs", "not allowed with", "--steps"],
    "train --data {cache} --steps 0 --batch 0": ["--batch 0", "at least 1"],
}


@pytest.mark.parametrize("line, words", REFUSED.items(), ids=REFUSED)
def test_a_mistake_ends_in_one_line(line, words, bad, videos, cache, half, picture, methods, tmp_path,
                                    monkeypatch):
    places = dict(bad=bad, videos=videos, cache=cache, half=half, picture=picture, methods=methods, tmp=tmp_path,
                  tiny=model.TINY)
    before = contents(bad)
    name, *arguments = line.format(**places).split()
    defaults = ["--model", "tiny"]
    if name != "sample":
        defaults += ["--out", str(tmp_path / "out")]
    message = refusal(monkeypatch, name, *defaults, *arguments)              # of an option given twice the second wins
    assert all(word.format(**places) in message for word in words), message
    assert contents(bad) == before


def test_a_mistake_is_one_line_on_stderr_and_status_1(bad):
    command = [sys.executable, REPO / "train.py", "--data", bad / "channels", "--model", "tiny"]
    done = subprocess.run(command, cwd=bad, stderr=subprocess.PIPE, text=True)
    assert re.fullmatch(r"error: .*\n", done.stderr) and done.returncode == 1


def test_a_default_of_a_model_that_is_no_option_is_named(videos, tmp_path, monkeypatch):
    folder = shutil.copytree(model.TINY, tmp_path / "model")
    (folder / "defaults.json").write_text('{"train": {"learning_rate": 1}}')
    assert "learning_rate" in refusal(monkeypatch, "train", "--model", str(folder))


def test_more_processes_than_gpus_are_refused(videos, cache, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "3")
    for command in (f"data --videos {videos}", f"sample --data {cache}", f"train --data {cache}"):
        assert "this machine has 2" in refusal(monkeypatch, *command.split(), "--model", "tiny")


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", ["win", "lose", "checkpoint", "options.json"])
def test_a_damaged_file_is_refused_by_name(kind, damage, own_cache, half, tmp_path, monkeypatch):
    if kind == "options.json" and "head" in damage or kind != "checkpoint" and "shards" in damage:
        pytest.skip("has none")
    run, step = shutil.copytree(half, tmp_path / "run"), tmp_path / "run" / "checkpoints" / "step-000002"
    files = {"checkpoint": next(step.glob("*.safetensors")), "options.json": step / "options.json"}
    file = files.get(kind, own_cache / kind / "00001.safetensors")
    DAMAGES[damage](file)
    command = f"train --model tiny --data {own_cache} --out {run} --batch 4 --warmup 1 --lr 1e-4".split()
    message = refusal(monkeypatch, *command)
    assert str(file) in message or str(step) in message
