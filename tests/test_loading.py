"""Model folders that are broken, incomplete, on a hub or dangerous: refused in one line, and no pickle is opened."""
import ast, json, re, shutil, subprocess, sys
from fnmatch import fnmatch
from pathlib import Path

from tests.helpers import CONFIG, DIT, SCHEDULE, Toy, WEIGHTS, inputs, preference, rewrite

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

import model
import realdpo
from model import UserError

pytest_plugins = "tests.helpers"


def entries(name, **changes):
    return lambda folder: rewrite(folder / name, **changes)


def content(name, change):
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


# {loader: {what happened to the folder: (how, what the message says besides its name)}}
BREAKAGES = {
    model.load_dit: {
        "no such folder": (shutil.rmtree, "no such model folder"),
        "no transformer": (lambda f: shutil.rmtree(f / "transformer"), "has no transformer"),
        "no config": (lambda f: (f / CONFIG).unlink(), CONFIG),
        "config is not JSON": (content(CONFIG, lambda b: b[:-9]), CONFIG),
        "config is not text": (content(CONFIG, lambda b: b"\xff\xfe\x00" + b), CONFIG),
        "config is a list": (content(CONFIG, lambda b: b"[]"), CONFIG),
        "config without a class": (entries(CONFIG, _class_name=...), CONFIG),
        "unknown class": (entries(CONFIG, _class_name="UNet3DConditionModel"), "UNet3DConditionModel"),
        "config without heads": (entries(CONFIG, num_attention_heads=...), "num_attention_heads"),
        "config without channels": (entries(CONFIG, out_channels=...), "out_channels"),
        "2b": (entries(CONFIG, use_rotary_positional_embeddings=False, use_learned_positional_embeddings=False),
               "use_rotary.*2b"),
        "silent about rope": (entries(CONFIG, use_rotary_positional_embeddings=...), "use_rotary.* is False"),
        "1.5": (entries(CONFIG, patch_size_t=2, patch_bias=False, ofs_embed_dim=512), r"patch_size_t is 2.*1\.5"),
        "text to video": (entries(CONFIG, in_channels=4), "in_channels is 4.*text-to-video"),
        "unknown scheduler": (entries(SCHEDULE, _class_name="PNDMScheduler"), "PNDMScheduler"),
        "epsilon prediction": (entries(SCHEDULE, prediction_type="epsilon"), "epsilon"),
        "schedule without a prediction": (entries(SCHEDULE, prediction_type=...), "prediction_type"),
        "schedule without its rescaling": (entries(SCHEDULE, rescale_betas_zero_snr=...), "rescale_betas_zero_snr"),
        "schedule without betas": (entries(SCHEDULE, beta_start=...), "beta_start"),
        "no weights": (lambda f: (f / WEIGHTS).unlink(), "no .safetensors"),
        "empty weights": (content(WEIGHTS, lambda b: b""), WEIGHTS),
        "weights cut in the header": (content(WEIGHTS, lambda b: b[:100]), WEIGHTS),
        "weights cut in the last tensor": (content(WEIGHTS, lambda b: b[:-1]), WEIGHTS),
        "another shape": (entries(WEIGHTS, **{"proj_out.bias": torch.zeros(15)}),
                          "tensor proj_out.bias has 15 numbers, expected 16"),
        "a tensor missing": (entries(WEIGHTS, **{"transformer_blocks.1.attn1.norm_k.bias": ...}),
                             "tensor transformer_blocks.1.attn1.norm_k.bias has 0 numbers, expected 16"),
        "a tensor too many": (entries(WEIGHTS, **{"ofs_embedding.bias": torch.zeros(2)}),
                              "ofs_embedding.bias is not expected"),
        "a tensor in two files": (lambda f: shutil.copy(f / WEIGHTS, f / "transformer/other.safetensors"),
                                  "other.safetensors: tensor .* is in diffusion_pytorch_model.safetensors as well"),
        "one file of several lost": (
            lambda f: save_file({"proj_out.bias": load_file(f / WEIGHTS)["proj_out.bias"]}, f / WEIGHTS),
            "has 0 numbers.*65 tensors expected, 1 found")},
    model.load_vae: {
        "unknown convolution": (entries("vae/config.json", use_quant_conv=True), "use_quant_conv"),
        "config without a scale": (entries("vae/config.json", scaling_factor=...), "scaling_factor"),
        "fewer levels": (entries("vae/config.json", block_out_channels=[8, 16, 16]), "is not expected")},
    model.load_text_encoder: {
        "unknown class": (entries("text_encoder/config.json", architectures=["BertModel"]), "BertModel"),
        "two embeddings": (entries("text_encoder/model.safetensors",
                                   **{"encoder.embed_tokens.weight": torch.zeros(160, 12)}),
                           "encoder.embed_tokens.weight is not expected"),
        "no tokenizer": (lambda f: (f / "tokenizer/spiece.model").unlink(), "spiece.model"),
        "tokenizer cut short": (content("tokenizer/spiece.model", lambda b: b[:50]), "spiece.model")}}


@pytest.mark.parametrize("load, breakage", [(load, name) for load, table in BREAKAGES.items() for name in table])
def test_broken_folder_is_refused_in_one_line_with_its_name(copied, load, breakage):
    harm, message = BREAKAGES[load][breakage]
    harm(copied)
    with pytest.raises(model.UserError, match=message) as caught:
        load(copied)
    assert str(copied) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("flip", [0x01, 0xff])
def test_flipped_header_byte_never_loads_other_weights(copied, denoiser, flip):
    whole, refused = (copied / WEIGHTS).read_bytes(), 0
    positions = [*range(8), *range(8, 8 + int.from_bytes(whole[:8], "little"), 53)]
    for i in positions:
        (copied / WEIGHTS).write_bytes(whole[:i] + bytes([whole[i] ^ flip]) + whole[i + 1:])
        try:
            loaded = model.load_dit(copied).net.state_dict()
            assert all(torch.equal(loaded[name], x) for name, x in denoiser.net.state_dict().items())
        except model.UserError as e:
            assert str(copied) in str(e)
            refused += 1
    assert refused > 0.8 * len(positions)                  # the rest hit the file's remarks or its blanks


@pytest.mark.parametrize("frames, height, width, channels, message", [
    # not in the learned table
    (5, 8, 6, 4, r"\(5, 4, 3\).*\(2, 3\)"), (5, 4, 10, 4, r"\(5, 2, 5\).*\(2, 3\)"), (6, 4, 6, 4, "at most 5 frames"),
    (5, 5, 6, 4, r"\(1, 4, 5, 5, 6\).*divisible by 2"), (5, 4, 6, 5, r"\(1, 5, 5, 4, 6\).*\(B,4,F,H,W\)")])
def test_denoiser_refuses_latents_it_was_not_made_for(denoiser, frames, height, width, channels, message):
    with pytest.raises(model.UserError, match=message):
        denoiser(*inputs(1, frames, height, width, c=DIT | dict(out_channels=channels)), torch.ones(1))


@pytest.mark.parametrize("loss", [realdpo.realdpo_loss, realdpo.streamed_realdpo_loss])
@pytest.mark.parametrize("changes, message", [
    (dict(lose=torch.zeros(2, 4, 3, 4, 6)), r"lose \(2, 4, 3, 4, 6\)"),
    (dict(lose=torch.zeros(2, 1, 4, 2, 4, 6)), r"lose \(2, 1, 4, 2, 4, 6\)"),
    (dict(weighting="snr"), "snr")])
def test_wrong_arguments_of_the_loss_are_refused_with_their_values(loss, changes, message):
    with pytest.raises(ValueError, match=message):
        loss(Toy(1), Toy(2), **preference(2, 3) | dict(beta=1) | changes)


@pytest.mark.parametrize("options, message", [
    (dict(guidance=1, solver="heun"), "heun"), (dict(guidance=6), "guidance 6 needs uncond")])
def test_wrong_arguments_of_the_sampler_are_refused_with_their_values(options, message):
    with pytest.raises(ValueError, match=message):
        realdpo.sample(Toy(1), *inputs(), steps=2, **options)


@pytest.mark.parametrize("shape", [(1, 3, 8, 16, 16), (1, 4, 9, 16, 16), (3, 9, 16, 16)])
def test_the_vae_refuses_other_videos_with_their_shape(folder, shape):
    with pytest.raises(ValueError, match=re.escape(str(shape))):
        model.load_vae(folder).encode(torch.zeros(shape))


@pytest.fixture
def hub(folder, tmp_path, monkeypatch):
    """A hub that holds `folder` as owner/name; the fixture is the list of files it was asked for."""
    files = []

    def snapshot_download(repo_id, *, allow_patterns=("*",), **_):
        if repo_id != "owner/name":
            raise huggingface_hub.errors.LocalEntryNotFoundError("offline\nand more")
        for name in (str(f.relative_to(folder)) for f in folder.rglob("*.*")):
            if any(fnmatch(name, pattern) for pattern in allow_patterns):
                files.append(name)
                (tmp_path / name).parent.mkdir(exist_ok=True)
                shutil.copy(folder / name, tmp_path / name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)                            # where no folder is called owner/name
    return files


@pytest.mark.parametrize("load, needed", [
    (model.load_dit, {CONFIG, WEIGHTS, SCHEDULE}),
    (model.load_vae, {"vae/config.json", "vae/diffusion_pytorch_model.safetensors"}),
    (model.load_text_encoder, {"text_encoder/config.json", "text_encoder/model.safetensors", "tokenizer/spiece.model",
                               CONFIG})])
def test_hub_is_asked_only_for_the_needed_parts(hub, load, needed):
    load("owner/name")
    assert set(hub) == needed


def test_a_model_brings_its_option_defaults_and_a_run_has_its_bases(copied, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)                      # not to be called
    (copied / "defaults.json").write_text('{"sample": {"steps": 16}}')
    run = tmp_path / "run"
    run.mkdir()
    (run / "base.json").write_text(json.dumps({"model": str(copied)}))
    assert model.defaults_of(copied, "sample") == model.defaults_of(run, "sample") == {"steps": 16}
    assert model.defaults_of(copied, "train") == model.defaults_of("owner/name", "sample") == {}
    (run / "defaults.json").write_text('{"sample": {"steps": 8}}')
    assert model.defaults_of(run, "sample") == {"steps": 8}
    (copied / "defaults.json").write_text('{"sample": 16}')
    with pytest.raises(UserError, match="defaults.json: sample is 16"):
        model.defaults_of(copied, "sample")


@pytest.mark.parametrize("name", ["owner/absent", "a/b/c", "../owner", "/owner", "word"])
def test_unknown_hub_id_or_folder_is_refused_by_name(hub, name):
    with pytest.raises(model.UserError, match=f"^{name}: no such model folder.*") as caught:
        model.load_vae(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", sorted(Path(model.__file__).parent.glob("*.py")), ids=lambda file: file.name)
def test_source_never_unpickles(file):
    imported, used = set(), set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            imported |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        if isinstance(node, ast.Attribute | ast.keyword):
            used.add(ast.unparse(node) if isinstance(node, ast.Attribute) else node.arg)
    assert not {name.split(".")[0] for name in imported} & {"pickle", "_pickle", "cloudpickle", "dill", "joblib",
                                                            "shelve", "marshal"}
    assert not (imported | used) & {"torch.load", "allow_pickle"}


@pytest.mark.parametrize("load, part", [(model.load_dit, "transformer"), (model.load_vae, "vae"),
                                        (model.load_text_encoder, "text_encoder")])
def test_no_loader_opens_a_pickle(copied, tmp_path, load, part):
    marker, (weights,) = tmp_path / "executed", (copied / part).glob("*.safetensors")
    payload = f"cbuiltins\nopen\n(S{str(marker)!r}\nS'w'\ntR.".encode()     # unpickled, it creates the marker
    for name in ("diffusion_pytorch_model.bin", "pytorch_model.bin", "model.pt", "weights.pkl"):
        (copied / part / name).write_bytes(payload)
    load(copied)                                           # beside good weights, pickles are not touched
    index = '{"weight_map": {"w": "pytorch_model.bin"}}'
    for harm in (lambda: weights.write_bytes(payload), weights.unlink,
                 lambda: Path(f"{weights}.index.json").write_text(index)):
        harm()
        with pytest.raises(model.UserError, match=part):
            load(copied)
    assert not marker.exists()
    subprocess.run([sys.executable, "-c", f"import pickle; pickle.loads({payload!r})"], check=True)
    assert marker.exists()                                 # the trap works
