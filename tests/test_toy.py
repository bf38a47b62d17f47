"""The toy world, its measures, the tiny model."""
import re
from itertools import product

from tests.helpers import NAMES

from support import UserError
from support.films import from_uint8, to_uint8
import numpy as np
import pytest
import torch

import model
from toy import judge, make_model, world

pytest_plugins = "tests.helpers"

def test_making_the_tiny_model_goes_on_where_it_stopped(tmp_path):
    def fit(file, stop_at=None, steps=6):
        weights, calls = [torch.zeros(shape, requires_grad=True) for shape in (3, (4, 2))], []     # Adam's and Muon's

        def loss(rng):
            calls.append(rng.initial_seed())
            if len(calls) == stop_at:
                raise KeyboardInterrupt
            return sum((w - torch.randn(w.shape, generator=rng)).square().sum() for w in weights)

        make_model.optimize(weights, loss, steps, 0.1, tmp_path / file / "part.safetensors", save_every=2)
        return torch.cat([w.detach().flatten() for w in weights]), calls

    straight, draws = fit("straight")
    assert len({*draws}) == 6                              # every step has random numbers of its own
    with pytest.raises(KeyboardInterrupt):
        fit("cut", stop_at=4)
    continued, calls = fit("cut")
    assert torch.equal(straight, continued) and len(calls) == 4        # the last save was after step 2
    with pytest.raises(UserError, match=r"part.safetensors: was made with steps 6 \(now 12\)"):
        fit("cut", steps=12)

def test_muon_steps_are_orthogonal_and_go_downhill():
    matrices = torch.randn(3, 8, 5, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    for turned in (make_model.orthogonal(matrices), make_model.orthogonal(matrices.mT).mT):
        assert (left @ right - turned).norm(dim=(1, 2)).max() < 0.3 * 5 ** 0.5         # the five steps only come near
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
    assert np.array_equal(first, world.toy_video(0, 1)[0]) and caption == world.draw_figure(0, 1).caption
    figures = {world.draw_figure(*place) for place in product(range(10), repeat=2)}
    worlds = {world.world_of(*place) for place in product(range(20), world.KINDS)}
    assert len(figures) == len(worlds) == 100              # no two are alike
    faulty = world.toy_video(0, 1, strength=1.0)[0]
    assert np.array_equal(first[0], faulty[0]) and not np.array_equal(first, faulty)    # its first frame is right
    stored = world.read_toy_video(videos / f"{NAMES[0]}.mp4")
    assert judged_raw(stored, world.draw_figure(0, 0))["rvd"] < 0.2        # a quarter of the faults: 3

def test_limbs_hang_stretch_and_bend_as_their_angles_say():
    def hands_and_feet(*angles):                           # of both pieces of every limb
        ends = world.skeleton(np.array([[angles] * 4], float), np.full((1, 4), 0.1))
        return ends[0, 3::2, 1] - world.ROOT

    np.testing.assert_allclose(hands_and_feet(0, 0), [(0, 0.2)] * 4, atol=1e-9)
    out = np.array([(0.2, 0), (-0.2, 0), (0.2, 0), (-0.2, 0)])         # the figure's left is the picture's right
    np.testing.assert_allclose(hands_and_feet(90, 0), out, atol=1e-9)
    np.testing.assert_allclose(hands_and_feet(90, 90), out / 2 + (0, -0.1), atol=1e-9)           # bent on, upwards

def test_the_first_frame_tells_the_phase():
    """From one end of the swing to the other, in half a turn of the phase; the next half second goes on from there."""
    figure, rises = world.draw_figure(0, 0)._replace(action="waves its left arm", hertz=1.0), []
    for phase in np.linspace(-np.pi / 2, np.pi / 2, 9):
        angles, _ = world.pose(figure._replace(phase=phase), np.array([0, 0.5]))
        rises.append(angles[0, 0, 0])
        assert angles[:, 0, 0].sum() == pytest.approx(65 + 115)        # half a cycle later it is as far from the other
    assert rises == sorted(rises) and rises[0] == pytest.approx(65) and rises[-1] == pytest.approx(115)

def test_drawing_clips_goes_on_where_it_stopped(tmp_path):
    world.write_toy_videos(tmp_path, 1, seed=0)
    (tmp_path / "00000.txt").write_text("mine")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(TypeError):
        patch.setattr(world, "write_video", None)
        world.write_toy_videos(tmp_path, 2, seed=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000.mp4", "00000.txt", "00001.txt"]
    world.write_toy_videos(tmp_path, 2, seed=0)
    assert (tmp_path / "00001.mp4").is_file() and (tmp_path / "00000.txt").read_text() == "mine"

def test_limbs_are_measured_as_long_as_they_are():
    for index in range(3):
        video, figure = world.toy_video(5, index)[0], world.draw_figure(5, index)
        _, pieces = world.pose(figure, np.arange(17) / world.FPS)
        assert np.abs(judge.limb_lengths(judge.track(video)[0]) / (2 * pieces) - 1).mean() < 0.1

def test_what_may_follow_does_not_tell_the_figures_own_pace():
    figure = world.draw_figure(0, 0)
    other = figure._replace(hertz=1.03 * figure.hertz)
    assert np.array_equal(judge.continuations(other, 17, 32), judge.continuations(figure, 17, 32))

def test_the_measures_tell_real_from_corrupt_and_still():
    def scores(change=lambda video: video, **options):     # means over six figures
        judged = []
        for i in range(6):
            judged.append(judged_raw(change(world.toy_video(5, i, **options)[0]), world.draw_figure(5, i)))
        return {measure: np.mean([score[measure] for score in judged]) for measure in judged[0]}

    real, *corrupt = [scores(strength=strength) for strength in (0, 0.25, 0.5, 1)]
    frozen, grey = scores(lambda video: video[:1].repeat(17, axis=0)), scores(lambda video: np.full_like(video, 128))
    for measure in ("rvd", "limb_change", "jerkiness", "identity_loss"):
        values = [score[measure] for score in (real, *corrupt)]
        assert values == sorted(set(values)), (measure, values)
    assert real["rvd"] < 0.05 < corrupt[0]["rvd"] and real["action_match"] == 1
    assert abs(real["limb_change"]) < 0.5 and corrupt[2]["identity_loss"] > 3 and corrupt[2]["jerkiness"] > 2
    assert real["motion"] == pytest.approx(1, abs=0.05) and real["jerkiness"] == pytest.approx(1, abs=0.05)
    assert frozen["rvd"] > corrupt[1]["rvd"] and frozen["motion"] < 0.01
    assert np.isfinite([*frozen.values(), *grey.values()]).all()

def test_a_real_clip_through_the_autoencoder_is_real_and_what_it_is_compared_with_is_kept(tmp_path, monkeypatch):
    made, load_vae = [], model.load_vae
    coded = to_uint8(load_vae("tiny").decode(load_vae("tiny").encode(from_uint8(world.toy_video(5, 1)[0])[None]))[0])
    monkeypatch.setattr(model, "load_vae", lambda path: made.append(path) or load_vae(path))
    scores = judge.judge_all([(1, coded)], 5, tmp_path)
    assert scores["rvd"][0] < 0.1 and abs(scores["limb_change"][0]) < 0.5 and scores["action_match"] == [1]
    assert judge.judge_all([(1, coded)], 5, tmp_path) == scores and len(made) == 1
    monkeypatch.setattr(judge, "fingerprint_of", lambda *_: "another autoencoder")
    judge.judge_all([(1, coded)], 5, tmp_path)
    monkeypatch.setattr(judge, "PACES", judge.PACES[:3])
    judge.judge_all([(1, coded)], 5, tmp_path)
    assert len(made) == 3                                  # whatever they were made with is another: made anew

def test_a_folder_of_videos_is_judged(tmp_path, capsys):
    for name, strength in (("real", 0.0), ("faulty", 1.0)):
        world.write_toy_videos(tmp_path / name, 1, world.world_of(3, "held-out"), strength)
        judge.main(judge.Options(folder=str(tmp_path / name), seed=3))
    real, faulty = [dict(re.findall(r"(\w+) (-?[\d.]+)", line)) for line in capsys.readouterr().out.splitlines()]
    assert float(real["rvd"]) < 0.6 < 1 < float(faulty["rvd"]) and real["action_match"] == "1.00"
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match="other.*00000.mp4"):
        judge.main(judge.Options(folder=str(tmp_path / "other")))
