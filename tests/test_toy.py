"""The toy world, its measures, the tiny model."""
import re
from xml.etree import ElementTree

from tests.helpers import NAMES, metrics

import numpy as np
import pytest
import torch

import data
import model
import train
from model import UserError
from toy import curves, judge, make_model, world

pytest_plugins = "tests.helpers"


def test_a_run_is_drawn(straight):
    curves.main(curves.Options(run=str(straight)))
    picture = ElementTree.parse(straight / "curves.svg").getroot()
    texts = ["".join(text.itertext()) for text in picture.findall("{*}text")]
    lines = picture.findall("{*}polyline")
    assert {"preference loss (log 2 = 0.69)", "win − ref_win", "lose − ref_lose", "held-out win error, by t",
            "held-out lose error, by t", "step 3"} <= set(texts)
    assert len(lines) == 2 + 2 + 2 + 2 * len(train.EVAL_T)
    logged = metrics(straight)

    def y(line):
        return [float(point.split(",")[1]) for point in line.get("points").split()]

    # Upwards on a page, y falls.
    assert np.corrcoef(y(lines[0]), [line["preference"] for line in logged])[0, 1] == pytest.approx(-1, abs=0.01)
    assert np.corrcoef(y(lines[2]), [line["win"] - line["ref_win"] for line in logged])[0, 1] < -0.99
    assert min(y(lines[0])) >= 40 and max(y(lines[0])) <= 190
    assert curves.running_mean([(0, 1.0), (1, 3.0), (2, 5.0)], 2) == [(0, 1.0), (1, 2.0), (2, 4.0)]


def test_making_the_tiny_model_goes_on_where_it_stopped(tmp_path):
    def fit(file, stop_at=None, steps=6):
        weights, calls = [torch.zeros(shape, requires_grad=True) for shape in (3, (4, 2))], []     # Adam's and Muon's

        def loss(rng):
            calls.append(None)
            if len(calls) == stop_at:
                raise KeyboardInterrupt
            return sum((w - torch.randn(w.shape, generator=rng)).square().sum() for w in weights)

        make_model.optimize(weights, loss, steps, 0.1, tmp_path / file / "part.safetensors", save_every=2)
        return torch.cat([w.detach().flatten() for w in weights]), len(calls)

    straight, _ = fit("straight")
    with pytest.raises(KeyboardInterrupt):
        fit("cut", stop_at=4)
    continued, calls = fit("cut")
    assert torch.equal(straight, continued) and calls == 4                              # the last save was after step 2
    with pytest.raises(UserError, match=r"part.safetensors: was made with other settings: steps 6 \(now 12\)"):
        fit("cut", steps=12)


def test_muon_steps_are_orthogonal_and_go_downhill():
    matrices = torch.randn(3, 8, 5, generator=torch.Generator().manual_seed(0))
    turned = make_model.orthogonal(matrices)
    assert torch.equal(turned.mT, make_model.orthogonal(matrices.mT))
    values = torch.linalg.svdvals(turned)
    assert values.min() > 0.6 and values.max() < 1.3       # the five steps only come near
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    assert ((left @ right) * turned).sum((1, 2)).min() > 0.85 * 5              # and not to another orthogonal matrix

    goal, weight, momentum = matrices[0], torch.zeros(8, 5, requires_grad=True), torch.zeros(8, 5)
    for step in range(100):
        weight.grad = 2 * (weight.detach() - goal)
        make_model.muon([weight], [momentum], 0.1 * (1 - step / 100))
    assert (weight - goal).norm() < 0.1 * goal.norm()


def judged_raw(video, figure):
    """`judge` beside continuations that no autoencoder has blurred."""
    return judge.judge(video, figure, judge.continuations(figure, *video.shape[:2]))


def test_a_toy_clip_depends_on_seed_and_index_and_survives_mp4(videos):
    first, caption = world.toy_video(0, 1)
    world.toy_video(0, 2)
    assert np.array_equal(first, world.toy_video(0, 1)[0]) and caption == world.draw_figure(0, 1).caption
    assert not np.array_equal(first, world.toy_video(0, 2)[0]) and not np.array_equal(first, world.toy_video(1, 1)[0])
    faulty = world.toy_video(0, 1, strength=1.0)[0]
    assert np.array_equal(first[0], faulty[0]) and not np.array_equal(first, faulty)    # its first frame is right
    stored = [world.read_toy_video(videos / f"{name}.mp4") for name in NAMES]
    # a quarter of the faults: 2
    assert np.mean([judged_raw(clip, world.draw_figure(0, i))["rvd"] for i, clip in enumerate(stored)]) < 0.2


def test_the_measures_tell_real_from_corrupt_and_still():
    def scores(change=lambda video: video, **options):     # means over six figures
        judged = []
        for i in range(6):
            judged.append(judged_raw(change(world.toy_video(5, i, **options)[0]), world.draw_figure(5, i)))
        return {measure: np.mean([score[measure] for score in judged]) for measure in judged[0]}

    real, *corrupt = [scores(strength=strength) for strength in (0, 0.25, 0.5, 1)]
    frozen, grey = scores(lambda video: video[:1].repeat(17, axis=0)), scores(lambda video: np.full_like(video, 128))
    for measure in ("rvd", "limb_change", "jerkiness"):
        values = [score[measure] for score in (real, *corrupt)]
        assert values == sorted(set(values)), (measure, values)
    assert real["rvd"] < 0.05 < corrupt[0]["rvd"] and real["action_match"] == 1
    assert real["motion"] == pytest.approx(1, abs=0.05) and real["jerkiness"] == pytest.approx(1, abs=0.05)
    assert frozen["rvd"] > corrupt[1]["rvd"] and frozen["motion"] < 0.01
    assert np.isfinite([*frozen.values(), *grey.values()]).all()


def test_a_real_clip_through_the_autoencoder_is_real_and_what_it_is_compared_with_is_kept(tmp_path, monkeypatch):
    vae, clip = model.load_vae("tiny"), data.from_uint8(world.toy_video(5, 0)[0])
    coded = data.to_uint8(vae.decode(vae.encode(clip[None]))[0])
    scores = judge.judge_all([(0, coded)], 5, tmp_path)
    assert scores["rvd"][0] < 0.1 and abs(scores["limb_change"][0]) < 0.5
    monkeypatch.setattr(model, "load_vae", None)           # from here on there is nothing to make them with
    assert judge.judge_all([(0, coded)], 5, tmp_path) == scores
    monkeypatch.setattr(judge, "PACES", judge.PACES[:3])
    with pytest.raises(UserError, match=r"5-00000.safetensors: was made with other settings: paces 15 \(now 3\)"):
        judge.judge_all([(0, coded)], 5, tmp_path)


def test_a_folder_of_videos_is_judged(tmp_path, capsys):
    seed, measures = world.world_of(3, "held-out"), []

    def judge_folder(name):
        judge.main(judge.Options(folder=str(tmp_path / name), seed=3))
        found = re.findall(r"(\w+) (-?[\d.]+)", capsys.readouterr().out.split(":", 1)[1])
        return {measure: float(value) for measure, value in found}

    for name, strength in (("real", 0.0), ("faulty", 1.0)):
        world.write_toy_videos(tmp_path / name, 1, seed, strength)
        measures.append(judge_folder(name))
    real, faulty = measures
    assert real["rvd"] < 0.6 < 1 < faulty["rvd"] and real["limb_change"] < faulty["limb_change"]
    assert real["action_match"] == 1
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match="other.*00000.mp4"):
        judge_folder("other")
