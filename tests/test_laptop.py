"""What `python train.py` does without arguments: the whole road, on the toy world."""
import os, re

from tests.helpers import REPO, as_a_process, metrics

import imageio.v2 as imageio
import numpy as np
import pytest
import torch

import data
import model
import train
from toy import judge, laptop, world

pytest_plugins = "tests.helpers"


@pytest.fixture
def short(monkeypatch):
    """The whole story in small: two real clips, one held-out figure, two steps a run, videos in two evaluations."""
    defaults = model.defaults_of
    quick = {"sample": dict(steps=2, guidance=1.0)}
    monkeypatch.setattr(model, "defaults_of", lambda path, command: quick.get(command) or defaults(path, command))
    monkeypatch.setattr(laptop, "COUNTS", {"real": 2, "held-out": 1})
    monkeypatch.setattr(laptop, "SHOWN", 1)
    monkeypatch.setattr(judge, "PACES", judge.PACES[7:8])
    return dict(model="tiny", steps=2, batch=2, micro_batch=2, save_every=1, seed=1, lr=5e-4, checkpointing="none")


def test_the_laptops_story(short, tmp_path, monkeypatch, capsys):
    shown, side_by_side = [], laptop.side_by_side
    monkeypatch.setattr(laptop, "side_by_side", lambda columns: shown.append(columns) or side_by_side(columns))
    out = tmp_path / "run"
    with as_a_process():
        train.main(train.Options(out=str(out), **short))
    said, readme = capsys.readouterr().out.replace(str(out), "run-tiny"), (REPO / "README.md").read_text()
    commands = re.findall(r"^\$ (python (?:data|sample).py .*)", said, re.MULTILINE)
    told = [line for line in commands if f"\n$ {line}\n" in readme]
    assert len(commands) == 3 and told == [commands[0], commands[2]]       # the held-out figures' are left out there
    real = world.read_toy_video(out / "videos" / "real" / "00001.mp4")
    assert np.abs(real - world.toy_video(world.world_of(1, "real"), 1)[0].astype(int)).mean() < 2
    # Both runs take the same steps at the same rate.
    sft, realdpo = metrics(out / "sft"), metrics(out)
    assert [line["lr"] for line in sft] == [line["lr"] for line in realdpo] and len(sft) == 2
    assert "ref_win" in realdpo[0] and "ref_win" not in sft[0]
    assert sft[0]["win"] == pytest.approx(realdpo[0]["win"], rel=1e-5)     # the same records, noise and t
    names = re.findall(r"^  (\w.*?) +rvd ", said, re.MULTILINE)
    assert names == ["base", "SFT", "RealDPO + anchor"] and "1 held-out figures" in said
    # What is shown, column by column, is what --bench has shown.
    for columns in shown:
        assert [*columns] == ["base", "step 1", "RealDPO + anchor", "SFT", "real"]
        places = {"base": out / "videos" / "step-000000", "step 1": out / "videos" / "step-000001",
                  "RealDPO + anchor": out / "videos" / "step-000002", "SFT": out / "sft" / "videos" / "step-000002"}
        for name, folder in places.items():
            assert np.array_equal(columns[name][0], world.read_toy_video(folder / "00000.mp4")), name
        assert np.array_equal(columns["real"][0], world.toy_video(world.world_of(1, "held-out"), 0)[0])
    video = np.stack(imageio.mimread(out / "held-out.gif"))
    assert len(shown) == 2 and video.shape[:3] == (17, 14 + 3 * 32, 6 * 3 * 32)
    assert {path.name for path in (out / "held-out").iterdir()} == {"base", "sft", "realdpo"}


def test_the_laptops_story_ends_where_a_run_is_asked_to_stop(monkeypatch):
    monkeypatch.setattr(laptop, "prepare", lambda *_: "cache")
    monkeypatch.setattr(laptop, "write_bench", lambda *_: None)
    monkeypatch.setattr(laptop.dist, "barrier", lambda: None)
    monkeypatch.setattr(laptop, "compare_on_held_out", None)           # not to be called
    process, trained = data.Process(0, 1, torch.device("cpu"), torch.float32), []

    def train_until_asked(options):
        trained.append((options.method, options.data))
        return False

    laptop.run(train.Options(out="run"), process, train_until_asked)
    assert trained == [("sft", "cache")]
    alone = train.Options(method="dpo")
    assert laptop.runs_to_compare(alone) == [alone]        # is compared with its base


def test_a_held_out_video_depends_on_its_number_alone(cache, monkeypatch):
    monkeypatch.setattr(laptop.realdpo, "sample", lambda denoiser, noise, cond, **options: noise)
    monkeypatch.setattr(model.VAE, "decode", lambda vae, latents: latents[:, :3].clamp(-1, 1))
    records = data.Records(cache)
    one_by_one, together = (np.stack([*laptop.generate_held_out(None, "tiny", records, batch)]) for batch in (1, 16))
    assert np.array_equal(one_by_one, together) and len(np.unique(together, axis=0)) == len(records) == 4


def test_negatives_are_scored_by_their_distance_and_anew_when_they_are(own_cache, monkeypatch):
    drawn = []
    monkeypatch.setattr(laptop, "draw_figure", lambda *place: drawn.append(place))
    monkeypatch.setattr(laptop, "continuations", lambda *_: None)
    monkeypatch.setattr(laptop, "judge", lambda video, *_: {"rvd": float(video.mean())})
    laptop.score_negatives(own_cache, seed=3)
    assert drawn == [(world.world_of(3, "real"), number) for number in range(4)]
    scores = data.Records(own_cache, scores=True)[2]["scores"]
    videos = model.load_vae("tiny").decode(data.Records(own_cache)[2]["lose"].float())
    assert scores.tolist() == pytest.approx([-data.to_uint8(video).mean() for video in videos])
    laptop.score_negatives(own_cache, seed=3)
    assert len(drawn) == 4                                 # the scores are there
    later = (own_cache / "scores.json").stat().st_mtime + 10
    os.utime(own_cache / "lose" / "00001.safetensors", (later, later))
    laptop.score_negatives(own_cache, seed=3)
    assert len(drawn) == 8
