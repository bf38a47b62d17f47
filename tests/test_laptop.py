"""What `python train.py` does without arguments: the whole road, on the toy world."""
import os, re

from tests.helpers import REPO, as_a_process, metrics

from support import UserError, folders
from support.command import Process
from support.films import to_uint8
import imageio.v2 as imageio
import numpy as np
import pytest

import data
import model
import train
from toy import judge, laptop, world

pytest_plugins = "tests.helpers"

def test_the_laptops_story(tmp_path, monkeypatch, capsys):
    """In small: two real clips, one held-out figure, two steps a run, videos in two evaluations."""
    for module in (laptop, folders):
        monkeypatch.setattr(module, "defaults_of", lambda *_: dict(steps=2, guidance=1.0))
    monkeypatch.setattr(laptop, "COUNTS", {"real": 2, "held-out": 1})
    monkeypatch.setattr(laptop, "SHOWN", 1)
    monkeypatch.setattr(judge, "PACES", judge.PACES[7:8])
    shown, side_by_side, out = [], laptop.side_by_side, tmp_path / "run"
    monkeypatch.setattr(laptop, "side_by_side", lambda columns: shown.append(columns) or side_by_side(columns))
    with as_a_process():
        train.main(train.Options(model="tiny", out=str(out), steps=2, batch=2, micro_batch=2, save_every=1, seed=1,
                                 lr=5e-4, checkpointing="none"))
    said, readme = capsys.readouterr().out.replace(str(out), "run-tiny"), (REPO / "README.md").read_text()
    commands = re.findall(r"^\$ (python (?:data|sample).py .*)", said, re.MULTILINE)
    assert [f"\n$ {line}\n" in readme for line in commands] == [True, False, True]     # not the held-out figures'
    real = world.read_toy_video(out / "videos" / "real" / "00001.mp4").astype(int)
    assert np.abs(real - world.toy_video(world.world_of(1, "real"), 1)[0]).mean() < 2
    # Both runs take the same steps at the same rate, on the same records, noise and t.
    sft, realdpo = metrics(out / "sft"), metrics(out)
    assert [line["lr"] for line in sft] == [line["lr"] for line in realdpo] and len(sft) == 2
    assert sft[0]["win"] == pytest.approx(realdpo[0]["win"], rel=1e-5)
    assert re.findall(r"^  (\w.*?) +rvd ", said, re.MULTILINE) == ["base", "SFT", "RealDPO + anchor"]
    # What is shown, column by column, is what --bench has shown.
    (columns,) = shown
    places = {"base": out / "videos" / "step-000000", "step 1": out / "videos" / "step-000001",
              "RealDPO + anchor": out / "videos" / "step-000002", "SFT": out / "sft" / "videos" / "step-000002"}
    assert [*columns] == [*places, "real"]
    for name, folder in places.items():
        assert np.array_equal(columns[name][0], world.read_toy_video(folder / "00000.mp4")), name
    assert np.array_equal(columns["real"][0], world.toy_video(world.world_of(1, "held-out"), 0)[0])
    assert np.stack(imageio.mimread(out / "held-out.gif")).shape[:3] == (17, 14 + 3 * 32, 6 * 3 * 32)
    assert sorted(path.name for path in (out / "held-out").iterdir()) == ["base", "realdpo", "sft"]

def test_the_laptops_story_ends_where_a_run_is_asked_to_stop_and_is_one_seeds(tmp_path, monkeypatch):
    monkeypatch.setattr(laptop, "prepare", lambda *_: "cache")
    monkeypatch.setattr(laptop.dist, "barrier", lambda: None)
    monkeypatch.setattr(laptop, "compare_on_held_out", None)           # not to be called
    trained = []

    def tell(**options):
        laptop.run(train.Options(out=str(tmp_path), **options), Process(0, 1, None, None), trained.append)

    for name in ("bench", "resume", "eval_data"):
        with pytest.raises(UserError, match="--(bench|resume|eval-data) mine: is for runs on records of your own"):
            tell(**{name: "mine"})
    tell()
    assert [(run.method, run.data) for run in trained] == [("sft", "cache")]
    with pytest.raises(UserError, match=r"was made with seed 0 \(now 1\)"):
        tell(seed=1)
    assert len(laptop.runs_to_compare(train.Options(method="dpo"))) == 1           # is compared with its base alone

def test_a_held_out_video_depends_on_its_number_alone(cache, monkeypatch):
    monkeypatch.setattr(laptop.realdpo, "sample", lambda denoiser, noise, cond, **options: noise)
    monkeypatch.setattr(model.VAE, "decode", lambda vae, latents: latents[:, :3].clamp(-1, 1))
    one_by_one, together = [[*laptop.generate_held_out(None, "tiny", data.Records(cache), batch)] for batch in (1, 16)]
    assert np.array_equal(one_by_one, together) and len(np.unique(together, axis=0)) == 4

def test_negatives_are_scored_by_their_distance_and_anew_when_they_are(own_cache, monkeypatch):
    drawn = []
    monkeypatch.setattr(laptop, "draw_figure", lambda *place: drawn.append(place))
    monkeypatch.setattr(laptop, "continuations", lambda *_: None)
    monkeypatch.setattr(laptop, "judge", lambda video, *_: {"rvd": float(video.mean())})
    laptop.score_negatives(own_cache, seed=3)
    assert drawn == [(world.world_of(3, "real"), number) for number in range(4)]
    scores = data.Records(own_cache, scores=True)[2]["scores"]
    videos = model.load_vae("tiny").decode(data.Records(own_cache)[2]["lose"].float())
    assert scores.tolist() == pytest.approx([-to_uint8(video).mean() for video in videos])
    laptop.score_negatives(own_cache, seed=3)
    assert len(drawn) == 4                                 # the scores are there
    os.utime(own_cache / "scores.json", (1, 1))            # older than the negatives
    laptop.score_negatives(own_cache, seed=3)
    assert len(drawn) == 8
