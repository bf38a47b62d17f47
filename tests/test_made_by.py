"""What a file says it was made with, what its hash covers, what the noise in it depends on, and how it is written."""
import os, shutil

from tests.helpers import NAMES, add_negatives, assert_unrelated, encode, flip, generate_bench, rewrite

import pytest
import torch
from safetensors.torch import save_file

import data
import sample
from support import UserError, files, folders
from support.command import generator
from support.files import fingerprint_of_file, fingerprint_of_weights, hash_of, write_json
from support.lists import Clip

pytest_plugins = "tests.helpers"

def tiny_with_other(part, folder):
    """The tiny model with one bit of one part changed."""
    shutil.copytree(folders.TINY, folder)
    names = {"tokenizer": "spiece.model", "scheduler": "scheduler_config.json"}
    (file,) = (folder / part).glob(names.get(part, "*.safetensors"))
    flip(file, -1)
    return str(folder)

@pytest.mark.parametrize("place, setting, change", [       # another option, or another part of the model
    ("win", "frames", dict(frames=9)), ("win", "fps", dict(fps=4)), ("win", "seed", dict(seed=1)),
    ("win", "given_negatives", dict(given_negatives=True)), ("win", "text_encoder", "text_encoder"),
    ("win", "text_encoder", "tokenizer"), ("win", "vae", "vae"), ("lose", "steps", dict(steps=3)),
    ("lose", "negatives", dict(negatives=3)), ("lose", "guidance", dict(guidance=2.0)), ("alpha", "fps", dict(fps=4)),
    ("lose", "seed", dict(seed=1)), ("lose", "solver", dict(solver="euler")), ("lose", "transformer", "transformer"),
    ("lose", "transformer", "scheduler"), ("alpha", "steps", dict(steps=2)), ("alpha", "frames", dict(frames=17)),
    ("alpha", "guidance", dict(guidance=2.0)), ("alpha", "solver", dict(solver="multistep")),
    ("alpha", "seed", dict(seed=9)), ("alpha", "transformer", "transformer"), ("alpha", "others", "vae")], ids=str)
def test_whoever_adds_files_with_other_settings_is_refused_before_anything_is_loaded(
        place, setting, change, videos, own_cache, shots, methods, tmp_path, monkeypatch):
    for module in (data, sample):
        for name in ("load_vae", "load_text_encoder", "load_dit"):
            monkeypatch.setattr(module, name, None, raising=False)
    options = change if isinstance(change, dict) else dict(model=tiny_with_other(change, tmp_path / "other"))
    with pytest.raises(UserError, match=rf"{place}\S*: was made with {setting} .*rm -r \S+{place}"):
        if place == "win":
            folder = shutil.copytree(videos, tmp_path / "videos")
            shutil.copytree(videos, folder / "negative_samples" / "00000")
            data.main(data.Options(**dict(videos=str(folder), out=str(own_cache), model="tiny") | options))
        elif place == "lose":
            add_negatives(own_cache, **options)
        else:
            generate_bench(shots, methods / "alpha-method", **options)

def test_a_cache_that_says_nothing_of_what_made_it_or_is_of_another_version_is_refused(videos, own_cache):
    for kind, act in (("lose", lambda: add_negatives(own_cache)), ("win", lambda: encode(videos, own_cache))):
        note = own_cache / kind / "made_by.json"
        rewrite(note, version=files.VERSION - 1)
        with pytest.raises(UserError, match=f"{kind}: was made with version .* rm -r .*{kind}"):
            data.Records(own_cache)
        note.unlink()
        with pytest.raises(UserError, match="00000.safetensors: is there, but no made_by.json says what made it"):
            act()
        with pytest.raises(UserError, match=f"{note}: cannot be read"):
            data.Records(own_cache)

def test_a_records_hash_is_of_all_that_it_holds_and_of_the_scores_that_a_run_learns_from(own_cache):
    hashes, found = data.Records(own_cache).hashes, []
    for kind in ("win", "lose"):
        file = own_cache / kind / "00000.safetensors"
        tensors, metadata = files.read_tensors(file), files.read_header(file)[1]
        assert metadata["hash"] == hash_of(tensors)
        for tensor in tensors:
            changed = tensors[tensor].clone()
            changed.view(-1)[-1] += 1
            assert hash_of(tensors | {tensor: changed}) != metadata["hash"]
        found.append(metadata["hash"])
    assert hashes["00000"] == "".join(found) and len({*hashes.values()}) == 4
    for better in (1.0, 2.0):
        write_json(own_cache / "scores.json", {name: [0.0, better] for name in NAMES})
        hashes[better] = data.Records(own_cache, scores=True).hashes["00000"]
    assert len({*hashes.values()}) == 6

def test_fingerprints_tell_contents_of_one_size_apart(tmp_path):
    def weights(prefix="", config="{}", **changes):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        tensors = {"ref.a": torch.zeros(999, 2), "ref.b": torch.zeros(3), "model.c": torch.zeros(2)}
        save_file(tensors | changes, folder / "a.safetensors")
        (folder / "config.json").write_text(config)
        for name in ("README.md", "._a.safetensors"):      # are passed over
            (folder / name).write_text(folder.name)
        return fingerprint_of_weights(folder, prefix)

    last = torch.cat([torch.zeros(998, 2), torch.ones(1, 2)])
    assert weights("ref.") == weights("ref.", **{"model.c": torch.ones(2)})
    different = [weights(), weights("ref."), weights(config="[]"), weights(**{"ref.a": last}),
                 weights(**{"ref.b": torch.ones(3)}), weights(**{"ref.b": torch.zeros(3, dtype=torch.int)})]
    for content in (b"", b"a", b"b", bytes(2 ** 20), bytes(2 ** 20 + 1), bytes(2 ** 20 - 1) + b"1"):
        (tmp_path / "file").write_bytes(content)
        different.append(fingerprint_of_file(tmp_path / "file"))
    assert len({*different}) == len(different)

class Plain:
    """An autoencoder whose posterior has the pixels' mean and a standard deviation of 1."""

    def encode(self, video, generator):
        return video + torch.randn(video.shape, generator=generator)

def encoded(name="a", seed=0, negatives=1):
    """A grey clip's record and negatives."""
    video = torch.zeros(3, 9, 8, 8)
    return data.encode_clip(Clip(name, None, "", ""), (video, video[:, :1], [video] * negatives), Plain(), seed, "cpu")

def test_the_posteriors_noise_is_each_clips_each_parts_and_each_seeds_own():
    (record, negatives), (again, same) = encoded(), encoded()
    assert torch.equal(record["win"], again["win"]) and torch.equal(negatives[0], same[0])
    everything = []
    for record, negatives in (encoded(negatives=2), encoded(name="b"), encoded(seed=1)):
        everything += [record["win"], *negatives]
    assert_unrelated(torch.stack(everything).float())
    images = [encoded(name=name, seed=seed)[0]["image"] for name in "ab" for seed in (0, 1)]
    images.append(again["win"][:, :1])
    assert len(torch.stack(images).flatten(1).unique(dim=0)) == 5

def test_a_generator_depends_on_every_part_of_its_key():
    keys = [("a", 1, 2), ("a", 1, 3), ("a", 2, 2), ("b", 1, 2), ("a", 1), ("a", "1", 2), ("a1", 2)]
    draws = torch.stack([torch.randn(1000, generator=generator(*key)) for key in keys])
    assert_unrelated(draws)
    assert torch.equal(draws[0], torch.randn(1000, generator=generator("a", 1, 2)))

def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    flushed, fsync = [], os.fsync

    def spy(number):
        (part,) = tmp_path.iterdir()                       # and not a.json yet
        assert os.fstat(number).st_ino == part.stat().st_ino
        flushed.append(part.name)
        fsync(number)

    monkeypatch.setattr(files.os, "fsync", spy)
    write_json(tmp_path / "a.json", {})
    assert flushed[0].endswith(files.MARK) and [path.name for path in tmp_path.iterdir()] == ["a.json"]

def test_what_could_not_be_written_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="a.json: cannot be written"):
        write_json(tmp_path / "file" / "a.json", {})
    with pytest.raises(ZeroDivisionError), files.whole_file(tmp_path / "a.json") as part:
        part.write_text("half of i")
        1 / 0
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
