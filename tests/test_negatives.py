"""What sample.py makes: negatives, videos of a bench, one video."""
import shutil

from support import UserError, films
from support.lists import read_bench
from tests.helpers import (HOSTILE, add_negatives, assert_unrelated, contents, generate_bench, jsonl, make_video,
                           on_rank, relative, spy_on_videos)

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
        assert (call["steps"], call["guidance"], call["solver"]) == (7, 2.5, "euler")
        assert torch.equal(record["lose"][number % 3], call["noise"][0].bfloat16())    # as the sampler gives it
    assert_unrelated(torch.cat([call["noise"] for call in asked]))

def test_videos_of_a_bench_are_asked_for_with_their_own_picture_and_caption(shots, asked, tmp_path):
    for seed in (0, 1):
        generate_bench(shots, tmp_path / str(seed), steps=7, guidance=2.5, solver="multistep", seed=seed)
    encode_text, vae = model.load_text_encoder("tiny"), model.load_vae("tiny")
    prompts, _ = read_bench(shots)
    for call, prompt in zip(asked, prompts * 2, strict=True):
        assert torch.equal(call["cond"].text, encode_text([prompt.caption]))
        mean = vae.encode(films.read_image(prompt.file, 32, 32)[None])              # a sample of its posterior
        assert 0 < relative(call["cond"].image, mean) < 0.2
        assert torch.equal(call["uncond"], encode_text([""]))
        assert (call["steps"], call["guidance"], call["solver"]) == (7, 2.5, "multistep")
    assert_unrelated(torch.cat([call["noise"] for call in asked]))         # of each picture and seed its own

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

@pytest.mark.parametrize("options, settled", [
    (dict(data="cache"), ("multistep", 12)), (dict(image="a.png"), ("euler", 50)), (dict(bench="shots"), ("euler", 50)),
    (dict(data="cache", solver="euler"), ("euler", 50)), (dict(data="cache", steps=9), ("multistep", 9)),
    (dict(image="a.png", solver="multistep"), ("multistep", 25))], ids=str)
def test_negatives_take_a_quarter_of_the_evaluations_of_a_published_video(options, settled):
    options = sample.settle(sample.Options(**options))
    assert (options.solver, options.steps) == settled

def test_one_picture_and_one_sentence_become_an_mp4(picture, straight, tmp_path):
    video = make_video(tmp_path / "a.mp4", picture)
    assert video.shape == (17, 32, 32, 3)
    assert np.array_equal(make_video(tmp_path / "b.mp4", picture), video)
    assert not np.array_equal(make_video(tmp_path / "c.mp4", picture, seed=1), video)
    assert make_video(tmp_path / "d.mp4", picture, prompt="", frames=9, fps=4).shape == (9, 32, 32, 3)
    assert films.read_video_header(tmp_path / "d.mp4").seconds == pytest.approx(9 / 4, abs=0.02)
    # a training run is a model, too
    assert make_video(tmp_path / "e.mp4", picture, model=str(straight)).shape == video.shape

def test_any_number_of_ranks_makes_the_same_bench_and_restarts_do_the_rest(shots, methods, tmp_path, monkeypatch):
    made = spy_on_videos(monkeypatch)
    for rank in (1, 0):
        on_rank(monkeypatch, rank, 2)
        generate_bench(shots, tmp_path / "two", seed=1)
    assert made == ["walk-12.mp4", "somersault.mp4"]
    (tmp_path / "two" / "somersault.mp4").unlink()
    generate_bench(shots, tmp_path / "two", seed=1)
    assert made[2:] == ["somersault.mp4"] and contents(tmp_path / "two") == contents(methods / "beta-method")

def test_every_form_of_bench_gives_the_same_prompts(shots, tmp_path):
    prompts, held = read_bench(shots)
    files, captions = "somersault.png\nwalk-12.png\n", f"{HOSTILE}\na figure walks\n"
    rows = [dict(file_name=prompt.file.name, text=prompt.caption) for prompt in prompts]
    pair, pairs = {"image.txt": files, "prompt.txt": captions}, {"images.txt": files, "prompts.txt": captions}
    for form in jsonl(*rows), pairs, pair:
        folder = shutil.copytree(shots, tmp_path / [*form][0], ignore=shutil.ignore_patterns("*.txt"))
        for name in form:
            (folder / name).write_text(form[name], encoding="utf-8")
        assert read_bench(folder)[1] == held, form
    (folder / "walk-12.png").write_bytes(b"another")
    assert read_bench(folder)[1] != held
    (folder / "walk-12.png").unlink()
    with pytest.raises(UserError, match="image.txt, row 2: .*walk-12.png is not there"):
        read_bench(folder)
