"""What a file says it was made with, what its hash covers, what the noise in it depends on, and how it is written."""
import shutil

from tests.helpers import NAMES, add_negatives, assert_unrelated, encode, flip, generate_bench, rewrite

import pytest
import torch
from safetensors.torch import save_file

import data
import sample
from support import UserError, files, folders
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

def test_a_cache_of_another_version_or_without_a_note_is_refused(videos, own_cache):
    note = own_cache / "win" / "made_by.json"
    rewrite(note, version=files.VERSION - 1)
    with pytest.raises(UserError, match="win: was made with version .* rm -r .*win"):
        data.Records(own_cache)
    note.unlink()
    with pytest.raises(UserError, match=f"{note}: cannot be read"):
        data.Records(own_cache)
    with pytest.raises(UserError, match="00000.safetensors: is there, but no made_by.json says what made it"):
        encode(videos, own_cache)

def test_a_records_hash_is_of_all_that_it_holds_and_of_the_scores_that_a_run_learns_from(own_cache):
    hashes, found = data.Records(own_cache).hashes, []
    for kind in ("win", "lose"):
        tensors = files.read_tensors(own_cache / kind / "00000.safetensors")
        found.append(hash_of(tensors))
        for tensor in tensors:
            changed = tensors[tensor].clone()
            changed.view(-1)[-1] += 1
            assert hash_of(tensors | {tensor: changed}) != found[-1]
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

def encoded(name, seed):
    """A grey clip's record and its two negatives."""
    video = torch.zeros(3, 9, 8, 8)
    return data.encode_clip(Clip(name, None, "", ""), (video, video[:, :1], [video] * 2), Plain(), seed, "cpu")

def test_the_posteriors_noise_is_each_clips_each_parts_and_each_seeds_own():
    latents, images = [], []
    for record, negatives in (encoded("a", 0), encoded("b", 0), encoded("a", 1)):
        latents += [record["win"], *negatives]
        images.append(record["image"])
    assert_unrelated(torch.stack(latents).float())
    images.append(latents[0][:, :1])
    assert len(torch.stack(images).flatten(1).unique(dim=0)) == 4
    assert torch.equal(encoded("a", 0)[0]["win"], latents[0])

def test_a_file_is_on_the_disk_before_it_has_its_name_and_half_a_file_leaves_nothing(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(files.os, "fsync", lambda number: flushed.extend(path.name for path in tmp_path.iterdir()))
    write_json(tmp_path / "a.json", {})
    assert flushed[0].endswith(files.MARK) and [path.name for path in tmp_path.iterdir()] == ["a.json"]
    with pytest.raises(ZeroDivisionError), files.whole_file(tmp_path / "b.json") as part:
        part.write_text("half of i")
        1 / 0
    with pytest.raises(UserError, match="b.json: cannot be written"):
        write_json(tmp_path / "a.json" / "b.json", {})
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
