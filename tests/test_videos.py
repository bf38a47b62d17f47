"""A bench of pictures and the videos made of it."""
import json, re, shutil

from tests.helpers import HOSTILE, add_negatives, contents, generate_bench, make_video, on_rank, spy_on_videos

import imageio.v2 as imageio
import numpy as np
import torch

import model
import sample

pytest_plugins = "tests.helpers"


def test_every_block_is_compiled_for_videos_and_for_negatives(own_cache, picture, tmp_path, monkeypatch):
    compiled, blocks = [], len(model.load_dit("tiny").net.transformer_blocks)

    def spy(function, **options):
        compiled.append(options)
        return function

    monkeypatch.setattr(torch, "compile", spy)
    monkeypatch.setattr(sample, "sample", lambda denoiser, noise, cond, **options: noise)
    make_video(tmp_path / "a.mp4", picture, compile=True, frames=9, steps=1)
    assert len(compiled) == blocks
    (own_cache / "lose" / "00000.safetensors").unlink()
    add_negatives(own_cache, compile=True)
    assert compiled == 2 * blocks * [dict(fullgraph=True)]


def test_any_number_of_ranks_makes_the_same_bench_and_restarts_do_what_is_missing(shots, methods, tmp_path,
                                                                                  monkeypatch):
    for rank in (1, 0):
        on_rank(monkeypatch, rank, 2)
        generate_bench(shots, tmp_path / "two", seed=1, samples=2)
    assert contents(tmp_path / "two") == contents(methods / "beta-method") and len(contents(tmp_path / "two")) == 5
    monkeypatch.undo()
    (tmp_path / "two" / "somersault-1.mp4").unlink()
    made = spy_on_videos(monkeypatch)
    generate_bench(shots, tmp_path / "two", seed=1, samples=2)
    assert made == ["somersault-1.mp4"]
    assert contents(tmp_path / "two") == contents(methods / "beta-method")


def test_a_bench_has_the_names_by_which_vbench_finds_the_pictures(shots, methods):
    assert {path.name for path in (methods / "alpha-method").glob("*.mp4")} == {"somersault.mp4", "walk-12-0.mp4"}
    for path in methods.glob("*/*.mp4"):
        assert (shots / f"{re.sub('-[0-9]+$', '', path.stem)}.png").is_file()          # vbench get_prompt_from_filename


def test_every_form_of_bench_gives_the_same_prompts(shots, tmp_path):
    for form in ("authors", "jsonl"):
        shutil.copytree(shots, tmp_path / form / "images", ignore=shutil.ignore_patterns("*.txt"))
    names = ["somersault", "walk-12"]
    prompts, held = sample.read_bench(shots)
    captions = [prompt.caption for prompt in prompts]
    (tmp_path / "authors" / "images.txt").write_text("".join(f"images/{name}.png\n" for name in names))
    (tmp_path / "authors" / "some_test.txt").write_text("\n".join(captions), encoding="utf-8")
    rows = [dict(file_name=f"images/{name}.png", text=caption, name=f"{name} by name")
            for name, caption in zip(names, captions)]
    (tmp_path / "jsonl" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (authors, same), (by_row, other) = (sample.read_bench(tmp_path / form) for form in ("authors", "jsonl"))
    assert [prompt.caption for prompt in authors] == captions and captions[0] == HOSTILE.strip()
    assert [prompt.name for prompt in authors] == names
    assert [(prompt.name, prompt.caption) for prompt in by_row] == [(row["name"], row["text"]) for row in rows]
    assert same == held != other
    imageio.imwrite(tmp_path / "authors" / "images" / "walk-12.png", np.zeros((8, 8, 3), np.uint8))
    assert sample.read_bench(tmp_path / "authors")[1] != held
