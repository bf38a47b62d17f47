"""Adapters of low rank: policy and reference on one frozen base, into diffusers and back, and where it can go wrong."""
import json, shutil
from functools import partial

from support import UserError, folders
from support.folders import ADAPTERS, fingerprint_of
from tests.helpers import (SCHEDULER, checkpoint, exported, inputs, make_video, metrics, preference, relative,
                           run_training, same_tensors)
from tests.test_resuming import run_on_ranks

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import model
import realdpo

pytest_plugins = "tests.helpers"

LOW = dict(rank=4, lr=5e-3, warmup=0)

@pytest.fixture(scope="module")
def adapted(cache):
    """Four steps with adapters, every checkpoint kept."""
    import train
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "KEEP", 9)
        run_training(cache.parent / "adapted", cache, save_every=1, **LOW)
    return cache.parent / "adapted"

def pair(folder, rank=4, moved=True):
    """Policy and reference on one network; `moved` away from each other, so that no side can pass for the other."""
    policy, reference = model.load_dit(folder, rank=rank)
    if moved:
        for seed, denoiser in enumerate((policy, reference)):
            for i, tensor in enumerate(denoiser.parameters()):
                torch.nn.init.normal_(tensor, std=0.3, generator=torch.Generator().manual_seed(100 * seed + i))
    return policy, reference.requires_grad_(False)


# ---- One base, two sides --------------------------------------------------------------------------------------------

def test_a_run_starts_at_log_2_to_the_bit_and_moves_nothing_but_each_sides_adapters(adapted):
    assert metrics(adapted)[0]["preference"] == torch.tensor(2.0).log().item() and metrics(adapted)[0]["margin"] == 0
    before, last = checkpoint(adapted, 1), checkpoint(adapted, 4)
    assert all(".lora_" in name for name in last) and len(last) == 4 * 2 * 6 * 2      # kinds, A and B, layers, blocks
    for step in range(2, 5):                               # the reference follows, A and B each on their own
        now = checkpoint(adapted, step)
        for name in now:
            if name.startswith("ref."):
                policy = now[name.replace("ref.", "model.")]
                assert torch.equal(now[name], torch.lerp(before[name], policy, 1 - 0.996))
                assert not torch.equal(now[name], policy)
        before = now
    assert {path.name for path in adapted.iterdir()} >= {ADAPTERS, "base.json", "done"}
    assert not (adapted / "transformer").exists()

def test_both_sides_begin_with_the_same_a_which_their_names_decide_and_b_zero(folder):
    (policy, reference), (again, _) = model.load_dit(folder, rank=3), model.load_dit(folder, rank=3)
    ours, theirs = dict(policy.named_parameters()), dict(reference.named_parameters())
    assert same_tensors(ours, theirs) and same_tensors(ours, dict(again.named_parameters()))
    assert {p.data_ptr() for p in ours.values()}.isdisjoint(p.data_ptr() for p in theirs.values())
    a = [tensor for name, tensor in ours.items() if "lora_A" in name]
    assert len({tensor.sum().item() for tensor in a}) == len(a)
    assert not any(tensor.any() for name, tensor in ours.items() if "lora_B" in name)
    assert not any(p.requires_grad for name, p in policy.net.named_parameters() if ".adapters." not in name)

@pytest.mark.parametrize("checkpointing", [True, "selective"])
@pytest.mark.parametrize("graphs", ["all", "two", "one"])
def test_what_backward_computes_again_is_the_policys_though_the_reference_came_after(folder, graphs, checkpointing):
    found = []
    for how in (False, checkpointing):
        policy, reference = pair(folder)
        policy.checkpointing = how
        loss = realdpo.realdpo_loss
        if graphs != "all":
            loss = partial(realdpo.streamed_realdpo_loss, graphs=graphs)
        loss(policy, reference, **preference_of(policy), beta=3.0)[0].backward()
        found.append({name: p.grad for name, p in policy.named_parameters()})
        assert all(p.grad is None for p in reference.parameters())
    assert all(grad.abs().max() > 0 for grad in found[0].values()) and same_tensors(*found)

def preference_of(denoiser):
    """A preference that fits the small transformer."""
    given = preference(1, 2)
    (win, cond) = inputs(1, frames=3)
    return given | dict(win=win, cond=cond)

@torch.no_grad()
def test_a_side_is_its_base_with_its_own_products_merged(folder):
    policy, reference = pair(folder)
    x_t, cond = inputs(2)
    t = torch.tensor([0.3, 0.9])
    for denoiser in (policy, reference):
        merged = model.load_dit(folder)
        model.merge(merged.net, {name: p.detach() for name, p in denoiser.named_parameters()}, folder)
        assert relative(merged(x_t, cond, t), denoiser(x_t, cond, t)) <= 2e-5
        assert relative(model.load_dit(folder)(x_t, cond, t), denoiser(x_t, cond, t)) > 1e-3

@pytest.mark.parametrize("method", ["sft", "dpo", "rwr"])
def test_other_methods_train_adapters_too(method, own_cache, tmp_path):
    scores = {path.stem: [0.0, 1.0] for path in (own_cache / "win").glob("*.safetensors")}
    (own_cache / "scores.json").write_text(json.dumps(scores))
    lines = run_training(tmp_path / "run", own_cache, method=method, steps=3, **LOW)
    assert lines[2]["loss"] != lines[0]["loss"] and (tmp_path / "run" / ADAPTERS).is_file()
    if method == "dpo":
        assert lines[0]["loss"] == torch.tensor(2.0).log().item()


# ---- Going on, and several ranks ------------------------------------------------------------------------------------

def test_a_run_goes_on_to_the_bit_and_not_with_another_rank(adapted, cache, tmp_path):
    run_training(tmp_path / "run", cache, steps=2, **LOW)
    assert run_training(tmp_path / "run", cache, **LOW) == metrics(adapted)
    assert same_tensors(checkpoint(tmp_path / "run", 4), checkpoint(adapted, 4))
    assert same_tensors(load_file(tmp_path / "run" / ADAPTERS), load_file(adapted / ADAPTERS))
    with pytest.raises(UserError, match=r"rank 4 \(now 8\)"):
        run_training(tmp_path / "run", cache, steps=5, **LOW | dict(rank=8))

def test_two_ranks_take_the_steps_of_one(adapted, cache, tmp_path):
    run_on_ranks([dict(out=tmp_path / "two", cache=cache, steps=2, save_every=1, **LOW)], tmp_path)
    for ours, theirs in zip(metrics(tmp_path / "two"), metrics(adapted)):
        assert ours == pytest.approx(theirs, abs=1e-5, rel=1e-4)
    run_training(tmp_path / "two", cache, save_every=1, **LOW)                           # on one rank now
    ours, theirs = load_file(tmp_path / "two" / ADAPTERS), load_file(adapted / ADAPTERS)
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-3) for name in theirs)

def test_a_second_round_starts_from_the_runs_own_adapters_and_still_fits_the_base(adapted, cache, picture, tmp_path):
    (line,) = run_training(tmp_path / "again", cache, model=str(adapted), steps=1, save_every=1, **LOW)
    assert line["preference"] == torch.tensor(2.0).log().item()
    ended = load_file(adapted / ADAPTERS)
    for name, tensor in checkpoint(tmp_path / "again", 1).items():
        if name.startswith("ref."):                        # after one step, 0.4 % of it away
            assert relative(tensor, ended["transformer." + name[4:]]) < 0.1
    assert json.loads((tmp_path / "again" / "base.json").read_text()) == {"model": "tiny"}
    with pytest.raises(UserError, match="lora_[AB].weight is .*4.*, expected .*2"):
        run_training(tmp_path / "other", cache, model=str(adapted), steps=1, rank=2)
    (line,) = run_training(tmp_path / "whole", cache, model=str(adapted), steps=1)       # of what they make, merged
    merged = model.load_dit(adapted).net.state_dict()
    assert line["margin"] == 0 and (tmp_path / "whole" / "transformer").is_dir()
    assert relative(exported(tmp_path / "whole")["proj_out.weight"].float(), merged["proj_out.weight"]) < 0.01
    run_training(tmp_path / "third", cache, model=str(tmp_path / "whole"), steps=1, **LOW)     # the base is that run
    assert json.loads((tmp_path / "third" / "base.json").read_text()) == {"model": str(tmp_path / "whole")}
    make_video(tmp_path / "third.mp4", picture, model=str(tmp_path / "third"))

@torch.no_grad()
def test_a_run_its_checkpoint_and_its_reference_are_models_of_their_own(adapted, picture, tmp_path):
    paths = [adapted, adapted / "checkpoints" / "step-000004", adapted / "checkpoints" / "step-000004" / "ref"]
    x_t, cond = torch.randn(1, 8, 5, 8, 8), realdpo.Condition(torch.randn(1, 16, 32), torch.randn(1, 8, 1, 8, 8))
    run, last, reference, base = [model.load_dit(path)(x_t, cond, torch.ones(1)) for path in (*paths, "tiny")]
    assert torch.equal(run, last) and not torch.equal(run, reference) and not torch.equal(reference, base)
    assert len({fingerprint_of(path, "transformer") for path in (*paths, "tiny")}) == 4
    assert make_video(tmp_path / "a.mp4", picture, model=str(adapted)).shape == (17, 32, 32, 3)


# ---- diffusers, and wrong files -------------------------------------------------------------------------------------

@pytest.fixture
def pipeline(diffusers):
    """diffusers' pipeline around the tests' tiny transformer."""
    pytest.importorskip("peft")
    transformer = diffusers.CogVideoXTransformer3DModel.from_pretrained(folders.TINY / "transformer",
                                                                        torch_dtype=torch.float32)
    scheduler = diffusers.CogVideoXDDIMScheduler.from_config(SCHEDULER)
    return diffusers.CogVideoXImageToVideoPipeline(None, None, None, transformer, scheduler)

@torch.no_grad()
@pytest.mark.parametrize("layers", [("attn1",), ("attn1", "ff")], ids=str)
def test_diffusers_opens_our_adapters_and_we_open_its(layers, pipeline, cache, tmp_path, monkeypatch):
    from diffusers.models.embeddings import get_3d_rotary_pos_embed
    from peft import get_peft_model_state_dict
    monkeypatch.setattr(model, "ADAPTED", layers)
    policy, _ = pair("tiny")
    model.save_dit(policy, tmp_path / "ours")
    pipeline.load_lora_weights(tmp_path / "ours")
    x, text, code = torch.randn(2, 16, 5, 8, 8), torch.randn(2, 16, 32), torch.tensor([300.0, 800.0])
    rope = get_3d_rotary_pos_embed(32, ((0, 0), (4, 4)), (4, 4), 5)
    expected = pipeline.transformer(x.transpose(1, 2), text, code, image_rotary_emb=rope, return_dict=False)[0]
    ours = policy.net(x, text, model.sinusoid(code, 96), side="policy")
    assert relative(ours, expected.transpose(1, 2)) <= 2e-5
    assert relative(ours, model.load_dit("tiny").net(x, text, model.sinusoid(code, 96))) > 0.01
    saved = get_peft_model_state_dict(pipeline.transformer, adapter_name="default_0")
    pipeline.save_lora_weights(tmp_path / "theirs", transformer_lora_layers=saved)
    for folder in ("ours", "theirs"):
        (tmp_path / folder / "base.json").write_text('{"model": "tiny"}')
        merged = model.load_dit(tmp_path / folder).net(x, text, model.sinusoid(code, 96))
        assert relative(merged, expected.transpose(1, 2)) <= 2e-5

def change_alpha(file):
    with safe_open(file, "pt") as f:
        noted = f.metadata()
    config = json.loads(noted["lora_adapter_metadata"]) | {"transformer.lora_alpha": 8}
    save_file(load_file(file), file, noted | {"lora_adapter_metadata": json.dumps(config)})

def rename(file):
    save_file({name.replace("to_q", "to_x"): tensor for name, tensor in load_file(file).items()}, file)

def other_base(file):
    with safe_open(file, "pt") as f:
        noted = f.metadata() | {"base": "0123456789abcdef"}
    save_file(load_file(file), file, noted)

@pytest.mark.parametrize("harm, message", [
    (change_alpha, "alpha that is not the rank"), (rename, "to_x.lora_A.weight belongs to no layer"),
    (other_base, "belong to another transformer than the one in"),
    (lambda file: file.write_bytes(file.read_bytes()[:-9]), "not a whole safetensors file"),
    (lambda file: (file.parent / "base.json").unlink(), "has no transformer")])
def test_a_wrong_file_of_adapters_is_one_line(harm, message, adapted, tmp_path):
    run = shutil.copytree(adapted, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    harm(run / ADAPTERS)
    with pytest.raises(UserError, match=message):
        model.load_dit(run)

@pytest.mark.slow
def test_compiled_blocks_with_two_sides_stay_within_the_recompile_limit(cache, tmp_path, monkeypatch):
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    plain = run_training(tmp_path / "plain", cache, steps=2, eval_data=str(cache), **LOW)
    compiled = run_training(tmp_path / "run", cache, steps=2, compile=True, eval_data=str(cache), **LOW)
    for ours, theirs in zip(compiled, plain):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)
