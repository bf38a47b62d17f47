"""Model folders that are broken, incomplete, on a hub or dangerous: refused in one line, and no pickle is opened."""
import json, shutil, subprocess, sys
from fnmatch import fnmatch
from functools import partial

import huggingface_hub
import pytest
import torch

import data
import model
import realdpo
from support import UserError
from support.folders import defaults_of, fingerprint_of
from tests.helpers import CONFIG, SCHEDULE, Toy, WEIGHTS, contents, inputs, preference, rewrite

pytest_plugins = "tests.helpers"

def entries(name, **changes):
    return lambda folder: rewrite(folder / name, **changes)

def content(name, change):
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))

config, schedule, weights = (partial(entries, name) for name in (CONFIG, SCHEDULE, WEIGHTS))
VAE, SPIECE = "vae/config.json", "tokenizer/spiece.model"

# {loader: {what happened to the folder: (how, what the message says besides its name)}}
BREAKAGES = {
    model.load_dit: {
        "no such folder": (shutil.rmtree, "no such model folder"),
        "config is not text": (content(CONFIG, lambda b: b"\xff\xfe\x00" + b), CONFIG),
        "unknown class": (config(_class_name="UNet3DConditionModel"), "UNet3DConditionModel"),
        "no heads": (config(num_attention_heads=...), "num_attention_heads"),
        "2b": (config(use_rotary_positional_embeddings=False), "use_rotary.*2b"),
        "silent about rope": (config(use_rotary_positional_embeddings=...), "use_rotary.* is False"),
        "1.5": (config(patch_size_t=2, patch_bias=False, ofs_embed_dim=512), r"patch_size_t is 2.*1\.5"),
        "text to video": (config(in_channels=4), "in_channels is 4, expected 8"),
        "unknown scheduler": (schedule(_class_name="PNDMScheduler"), "PNDMScheduler"),
        "schedule without its rescaling": (schedule(rescale_betas_zero_snr=...), "rescale_betas_zero_snr"),
        "weights cut in the last tensor": (content(WEIGHTS, lambda b: b[:-1]), WEIGHTS),
        "a row less": (weights(**{"proj_out.bias": torch.zeros(15)}), "proj_out.bias has 15 rows, expected 16"),
        "a tensor missing": (weights(**{"proj_out.bias": ...}), "proj_out.bias has 0 rows, expected 16"),
        "a tensor too many": (weights(**{"ofs_embedding.bias": torch.zeros(2)}), "ofs_embedding.bias is not expected")},
    model.load_vae: {
        "fewer levels": (entries(VAE, block_out_channels=[8, 16, 16]), r"is \[24, .*\], expected \[16, ")},
    model.load_text_encoder: {
        "unknown class": (entries("text_encoder/config.json", architectures=["BertModel"]), "BertModel"),
        "another tokenizer": (lambda f: (f / SPIECE).rename(f / "tokenizer/tokenizer.json"), r"tokenizer\.json"),
        "tokenizer cut short": (content(SPIECE, lambda b: b[:50]), SPIECE)}}

@pytest.mark.parametrize("load, breakage", [(load, name) for load, table in BREAKAGES.items() for name in table])
def test_broken_folder_is_refused_in_one_line_with_its_name(copied, load, breakage):
    harm, message = BREAKAGES[load][breakage]
    harm(copied)
    with pytest.raises(UserError, match=message) as caught:
        load(copied)
    assert str(copied) in str(caught.value) and "\n" not in str(caught.value)

loss = partial(realdpo.realdpo_loss, Toy(1), Toy(2), **preference(2, 3), beta=1)
streamed = partial(realdpo.streamed_realdpo_loss, *loss.args, **loss.keywords)

@pytest.mark.parametrize("call, message", [
    (lambda dit: dit(*inputs(1, 5, 8, 6), torch.ones(1)), r"\(5, 4, 3\).*\(5, 2, 3\)"),     # not in the learned table
    (lambda dit: dit(*inputs(1, 6, 4, 6), torch.ones(1)), r"at most \(5, 2, 3\)"),
    (lambda _: loss(lose=torch.zeros(2, 4, 3, 4, 6)), r"lose \(2, 4, 3, 4, 6\)"),
    (lambda _: streamed(lose=torch.zeros(2, 1, 4, 2, 4, 6)), r"lose \(2, 1, 4, 2, 4, 6\)"),
    (lambda _: realdpo.sample(Toy(1), *inputs(), steps=2, guidance=6), "guidance 6 needs uncond")])
def test_wrong_arguments_are_refused_with_their_values(denoiser, call, message):
    with pytest.raises(ValueError, match=message):
        call(denoiser)

def test_hidden_files_are_passed_over(copied, own_cache):
    parts = "transformer", "vae", "tokenizer"
    before = fingerprint_of(copied, *parts), data.Records(own_cache).hashes
    for file in [*copied.rglob("*.*"), *own_cache.rglob("*.*")]:
        file.with_name(f"._{file.name}").write_bytes(b"\0\5\x16\7")              # as a Mac leaves them
    assert (fingerprint_of(copied, *parts), data.Records(own_cache).hashes) == before
    for load in BREAKAGES:
        load(copied)

@pytest.mark.parametrize("load, needed, part", [
    (model.load_dit, {CONFIG, WEIGHTS, SCHEDULE}, "scheduler"),
    (model.load_vae, {VAE, "vae/diffusion_pytorch_model.safetensors"}, "vae"),
    (model.load_text_encoder, {"text_encoder/config.json", "text_encoder/model.safetensors", SPIECE, CONFIG},
     "tokenizer/spiece.model")])
def test_the_hub_is_asked_for_what_is_needed_and_what_it_lacks_is_named(load, needed, part, copied, monkeypatch):
    asked = set()

    def snapshot_download(name, allow_patterns):           # into a folder that has everything already
        for file in contents(copied):
            asked.update(file for pattern in allow_patterns if fnmatch(file, pattern))
        return str(copied)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(copied)                              # where no folder is called owner/name
    assert defaults_of("owner/name", "sample") == {} and not asked
    load("owner/name")
    assert asked == needed
    (copied / part).rename(copied / "moved")               # a download that was cut off
    with pytest.raises(UserError, match=f"^owner/name: {copied} has no {part}; "):
        load("owner/name")

@pytest.mark.parametrize("name", ["owner/absent", "../owner", "/owner", "word"])
def test_a_model_that_cannot_be_had_is_refused_by_name_with_the_cause(name, tmp_path, monkeypatch):
    def snapshot_download(*_, **__):
        raise RuntimeError("offline\nand more") from ConnectionResetError(104, "reset by peer\nand so on")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.json").write_text(json.dumps({"model": name}))
    for path, named in ((name, name), (tmp_path, f"{name}, which {tmp_path}/base.json names")):
        with pytest.raises(UserError, match=rf"\A{named}: .*\(ConnectionReset.*by peer.*\Z"):
            model.load_vae(path)

@pytest.mark.parametrize("load, part", [*zip(BREAKAGES, ("transformer", "vae", "text_encoder"))])
def test_no_loader_opens_a_pickle(copied, tmp_path, load, part):
    marker, (file,) = tmp_path / "executed", (copied / part).glob("*.safetensors")
    payload = f"cbuiltins\nopen\n(S{str(marker)!r}\nS'w'\ntR.".encode()     # unpickled, it creates the marker
    for name in ("diffusion_pytorch_model.bin", "pytorch_model.bin", "model.pt", "weights.pkl"):
        (copied / part / name).write_bytes(payload)
    load(copied)                                           # beside good weights, pickles are not touched
    for harm in (lambda: file.write_bytes(payload), file.unlink):
        harm()
        with pytest.raises(UserError, match=part):
            load(copied)
    assert not marker.exists()
    subprocess.run([sys.executable, "-c", f"import pickle; pickle.loads({payload!r})"], check=True)
    assert marker.exists()                                 # the trap works
