"""What the commands ask of the sampler: negatives, videos of a bench, one video."""
import shutil

from support import films
from support.lists import read_bench
from tests.helpers import (add_negatives, assert_unrelated, contents, make_video, on_rank, relative, same_tensors)

import numpy as np
import pytest
import torch

import data
import model
import sample

pytest_plugins = "tests.helpers"

@pytest.fixture
def asked(monkeypatch):
    """What sample.py asks of the sampler, call by call; instead of latents it gets the noise back."""
    calls = []

    def spy(denoiser, noise, cond, **options):
        calls.append(dict(options, denoiser=denoiser, noise=noise, cond=cond))
        return noise

    monkeypatch.setattr(sample, "sample", spy)
    return calls

def test_negatives_are_asked_for_with_their_records_caption_and_first_frame(own_cache, asked):
    shutil.rmtree(own_cache / "lose")
    add_negatives(own_cache, negatives=3, steps=7, guidance=2.5, solver="euler")
    records, empty = data.Records(own_cache), model.load_text_encoder("tiny")([""])[0]
    assert len(asked) == 3 * len(records) == 12
    for number, call in enumerate(asked):
        record = records[number // 3]
        assert torch.equal(call["cond"].text[0], record["text"]) and torch.equal(call["cond"].image[0], record["image"])
        assert torch.equal(call["uncond"][0], empty.bfloat16())
        assert (call["steps"], call["guidance"], call["solver"], call["progress"]) == (7, 2.5, "euler", False)
        assert torch.equal(record["lose"][number % 3], call["noise"][0].bfloat16())       # stored as the sampler gives it
    assert_unrelated(torch.cat([call["noise"] for call in asked]))
    policy, base = asked[0]["denoiser"].net.state_dict(), model.load_dit("tiny").net.state_dict()
    assert same_tensors(policy, base)

def test_videos_of_a_bench_are_asked_for_with_their_own_picture_and_caption(shots, asked, tmp_path):
    options = dict(model="tiny", bench=str(shots), steps=7, guidance=2.5, solver="multistep", frames=9)
    sample.main(sample.Options(out=str(tmp_path / "a"), **options))
    sample.main(sample.Options(out=str(tmp_path / "b"), **options, seed=1))
    encode_text, vae = model.load_text_encoder("tiny"), model.load_vae("tiny")
    prompts, _ = read_bench(shots)
    assert len(asked) == 2 * len(prompts)
    for call, prompt in zip(asked, prompts * 2):
        assert torch.equal(call["cond"].text, encode_text([prompt.caption]))
        mean = vae.encode(films.read_image(prompt.file, 32, 32)[None])              # a sample of its posterior
        assert 0 < relative(call["cond"].image, mean) < 0.2
        assert torch.equal(call["uncond"], encode_text([""]))
        assert (call["steps"], call["guidance"], call["solver"], call["progress"]) == (7, 2.5, "multistep", False)
    assert_unrelated(torch.cat([call["noise"] for call in asked]))         # of each picture and seed its own
    assert asked[0]["noise"].shape == (1, 8, 3, 8, 8)

def test_negatives_depend_only_on_seed_record_and_index(own_cache, monkeypatch):
    files = contents(own_cache / "lose")
    shutil.rmtree(own_cache / "lose")
    for rank in (1, 0):                                # two ranks, one after the other: they never wait for each other
        on_rank(monkeypatch, rank, 2)
        add_negatives(own_cache)
    assert contents(own_cache / "lose") == files
    monkeypatch.undo()
    two = data.Records(own_cache)[1]["lose"]
    shutil.rmtree(own_cache / "lose")
    (own_cache / "win" / "00000.safetensors").unlink()
    add_negatives(own_cache, negatives=1)                  # beside other records, and fewer of them
    one = data.Records(own_cache)[0]["lose"]
    assert torch.equal(one[0], two[0])
    assert not torch.equal(two[0], two[1])

def test_negatives_take_a_quarter_of_the_evaluations_of_a_published_video(monkeypatch):
    taken = []
    for action in "negatives", "make_videos":
        monkeypatch.setattr(sample, action, lambda options: taken.append((options.solver, options.steps)))
    for options in ({"data": "cache"}, {"image": "a.png"}, {"bench": "shots"}, {"data": "cache", "solver": "euler"},
                    {"data": "cache", "steps": 9}, {"image": "a.png", "solver": "multistep"}):
        sample.main(sample.Options(model="tiny", **options))
    assert taken == [("multistep", 12), ("euler", 50), ("euler", 50), ("euler", 50), ("multistep", 9),
                     ("multistep", 25)]

def test_one_picture_and_one_sentence_become_an_mp4(picture, straight, tmp_path):
    video = make_video(tmp_path / "a.mp4", picture)
    assert video.shape == (17, 32, 32, 3)
    assert np.array_equal(make_video(tmp_path / "b.mp4", picture), video)
    assert not np.array_equal(make_video(tmp_path / "c.mp4", picture, seed=1), video)
    assert make_video(tmp_path / "d.mp4", picture, prompt="", frames=9, fps=4).shape == (9, 32, 32, 3)
    assert films.read_video_header(tmp_path / "d.mp4").seconds == pytest.approx(9 / 4, abs=0.02)
    # a training run is a model, too
    assert make_video(tmp_path / "e.mp4", picture, model=str(straight)).shape == video.shape
