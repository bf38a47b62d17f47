"""A bench of pictures and the videos made of it."""
import shutil

from tests.helpers import HOSTILE, add_negatives, contents, generate_bench, jsonl, make_video, on_rank, spy_on_videos

import pytest
import torch

import model
import sample
from support import UserError
from support.lists import read_bench

pytest_plugins = "tests.helpers"

def test_every_block_is_compiled_for_videos_and_for_negatives(own_cache, picture, tmp_path, monkeypatch):
    compiled, blocks = [], len(model.load_dit("tiny").net.transformer_blocks)
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiled.append(options) or function)
    monkeypatch.setattr(sample, "sample", lambda denoiser, noise, cond, **options: noise)
    make_video(tmp_path / "a.mp4", picture, compile=True, frames=9)
    assert len(compiled) == blocks
    (own_cache / "lose" / "00000.safetensors").unlink()
    add_negatives(own_cache, compile=True)
    assert compiled == 2 * blocks * [dict(fullgraph=True)]

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
