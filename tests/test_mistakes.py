"""What a user can get wrong: each mistake ends in one line that names the file or the option."""
import shutil

import pytest
from safetensors.torch import load_file

from support import UserError, files, folders
from support.command import flags, this_process
from tests.helpers import DAMAGES, SHORT, contents, refusal
from toy import world

pytest_plugins = "tests.helpers"

@pytest.fixture(scope="session")
def bad(videos, cache, shots, tmp_path_factory):
    """A folder of everything that is wrong."""
    bad, clip = tmp_path_factory.mktemp("bad"), (videos / "00000.mp4").read_bytes()
    odd = {"no-caption/a.mp4": clip, "pictures/a.png": b"not a picture", "pictures/a.txt": b"a",
           "cut/a.mp4": clip[:len(clip) // 2], "cut/a.txt": b"a"}
    for name, content in odd.items():
        (bad / name).parent.mkdir(exist_ok=True)
        (bad / name).write_bytes(content)
    (shutil.copytree(shots, bad / "recaptioned") / "walk-12.txt").write_text("another caption")
    world.write_toy_videos(bad / "short", 1, seed=0, frames=5)
    shutil.copytree(folders.TINY, bad / "headless", ignore=shutil.ignore_patterns("transformer"))
    shutil.copytree(cache, bad / "no-negatives", ignore=shutil.ignore_patterns("lose"))
    file = shutil.copytree(cache, bad / "mixed") / "win" / "00002.safetensors"
    files.write_tensors(file, load_file(file), **files.read_header(file)[1] | dict(made_by="another"))
    return bad

# Command line: what its one line says. {same} stands for the options of the run {half}.
REFUSED = {
    "data --videos {bad}/nowhere": ["{bad}/nowhere", "no videos"],
    "data": ["--videos"],
    "data --videos {bad}/no-caption": ["a.mp4: has no caption", "a.txt"],
    "data --videos {bad}/cut": ["cut/a.mp4"],
    "data --videos {bad}/short": ["00000.mp4", "lasts 0.62 s, but 17 frames at 8 fps from 0 s on need 2.00 s"],
    "data --videos {videos} --frames 16": ["--frames 16", "8k + 1"],
    "data --videos {videos} --frames 25": ["--frames 25", "at most 17"],         # this model's learned positions
    "data --videos {videos} --given-negatives": ["{videos}: has no videos in negative_samples/"],
    "data --videos {videos} --model {bad}/headless": ["headless", "transformer/"],
    "data --videos {videos} --out {bad}/cut/a.txt": ["{bad}/cut/a.txt", "cannot be written"],
    "data --videos {videos} --frame 17": ["--frame", "--frames", "--skip-bad"],
    "sample": ["--data", "--image", "--bench"],
    "sample --data {cache} --prompt a": ["--prompt a", "no effect", "--data"],
    "sample --image {picture} --out {tmp}/a.avi": ["a.avi", ".mp4"],
    "sample --image {bad}/pictures/a.png --out {tmp}/a.mp4": ["a.png"],
    "sample --bench {bad}/pictures --out {tmp}": ["pictures/a.png", "picture"],
    "sample --bench {bad}/recaptioned --out {methods}/alpha-method": ["alpha-method", "was made with "],
    "train --data {bad}/nowhere": ["{bad}/nowhere: holds no records", "data.py", "sample.py"],
    "train --data {bad}/no-negatives": ["lose/00000.safetensors", "sample.py"],
    "train --data {bad}/mixed": ["win/00002.safetensors", "other settings or shapes than the other records"],
    "train --data {cache} --out {half} {same} --lr 3e-4": ["{half}", "lr 0.0001 (now 0.0003)"],
    "train --data {cache} --method dpo": ["scores.json", "expected"],
    "train --data {cache} --lose-per-step 3": ["--lose-per-step 3", "needs 3 negatives", "{cache} have 2"],
    "train --data {cache} --compare-every 4 --anchor 0": ["--anchor 0", "--compare-every 1"],
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

def test_a_launchers_variables_are_taken_together_or_refused(monkeypatch):
    assert this_process()[:2] == (0, 1)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match="^the environment has WORLD_SIZE, but not all of RANK, WORLD_SIZE, LOCAL_RANK"):
        this_process()
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert this_process()[:2] == (3, 4)

@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", ["win", "lose", "checkpoint", "checkpoint.json", "run.json"])
def test_a_damaged_file_is_refused_by_name(kind, damage, own_cache, half, tmp_path, monkeypatch):
    if kind.endswith(".json") and "head" in damage or kind != "checkpoint" and "shards" in damage:
        pytest.skip("has none")
    run, step = shutil.copytree(half, tmp_path / "run"), tmp_path / "run" / "checkpoints" / "step-000002"
    of_run = {"checkpoint": next(step.glob("*.safetensors")), "checkpoint.json": step / kind, "run.json": run / kind}
    file = of_run.get(kind, own_cache / kind / "00001.safetensors")
    DAMAGES[damage](file)
    arguments = flags(SHORT | dict(data=own_cache, out=run)).split()         # four steps: two more
    assert str(file) in refusal(monkeypatch, "train", *arguments)
