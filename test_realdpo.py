"""What a reader of the method wants to see proved: the method against formulas written out, the networks against the
libraries they reimplement, sampling, training, resuming on one rank and on two. tests/ holds all else, by subject.

    pytest                             in a minute and a half on two cores; needs diffusers and transformers for the
                                       oracles
    pytest -m slow                     several processes, compiled blocks, the experiment
    CHAOS=20 pytest -m chaos -s        kills every stage at random instants
    pytest -m gpu -s                   what only a GPU can show: a table, within ten minutes

All other tests run on the CPU, also where there is a GPU.
"""
import copy, dataclasses, io, json, math, os, re, shutil, signal
from functools import partial
from pathlib import Path
from weakref import WeakSet

from tests.helpers import (CONFIG, Count, DIT, FULL_DIT, FULL_T5, FULL_VAE, NAMES, PROMPTS, SCHEDULER, T5, Toy, VAE,
                           add_negatives, as_a_process, assert_unrelated, carried, checkpoint, contents, distances,
                           encode, exported, inputs, make_video, metrics, on_rank, preference, processes, public,
                           randn, relative, rewrite, rewrite_records, run_training, same_tensors, scramble,
                           spy_on_losses)

import huggingface_hub
import imageio.v2 as imageio
import numpy as np
import pytest
import sentencepiece
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn as nn
import torch.nn.functional as nnf
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._functorch.aot_autograd import make_boxed_func
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import data
import model
import realdpo
import sample
import train
from model import UserError
from realdpo import Condition

pytest_plugins = "tests.helpers"


# ---- The method, against formulas and a naive Appendix C ------------------------------------------------------------

def test_noising_goes_from_data_to_noise_in_fp32():
    x0, noise = randn(3, 4, 3, 2, 2).bfloat16(), randn(3, 4, 3, 2, 2, seed=1)
    x_t = realdpo.add_noise(x0, noise, torch.tensor([0.0, 0.3, 1.0]))              # 0.3 is another number in bf16
    assert x_t.dtype == torch.float32
    assert torch.equal(x_t[0], x0[0].float()) and torch.equal(x_t[2], noise[2])
    torch.testing.assert_close(x_t[1], 0.7 * x0[1].float() + 0.3 * noise[1])


def appendix_c(model, ref_model, x_w, x_l, c, timestep_k, noise, beta, weight):
    """The paper's listing for one pair, line by line, where `weight` is 1. Returns the alignment term and the four
    errors."""
    noisy_x_w = (1 - timestep_k) * x_w + timestep_k * noise
    noisy_x_l = (1 - timestep_k) * x_l + timestep_k * noise
    model_w_loss = weight * (x_w - model(noisy_x_w, c, timestep_k)).norm().pow(2)
    ref_w_loss = weight * (x_w - ref_model(noisy_x_w, c, timestep_k)).norm().pow(2)
    model_l_loss = weight * (x_l - model(noisy_x_l, c, timestep_k)).norm().pow(2)
    ref_l_loss = weight * (x_l - ref_model(noisy_x_l, c, timestep_k)).norm().pow(2)
    alignment_term = -0.5 * beta * ((model_w_loss - ref_w_loss) - (model_l_loss - ref_l_loss))
    return torch.stack([alignment_term, model_w_loss, model_l_loss, ref_w_loss, ref_l_loss])


def loss_by(graphs):
    """The loss in one of its three ways."""
    return realdpo.realdpo_loss if graphs == "all" else partial(realdpo.streamed_realdpo_loss, graphs=graphs)


@pytest.mark.parametrize("graphs", ["all", "two", "one"])
@pytest.mark.parametrize("anchor, scale", [(0.0, 1.0), (0.7, 1.0), (0.7, 4.0)])
@pytest.mark.parametrize("weighting", ["x0", "velocity"])
@pytest.mark.parametrize("batch, n", [(1, 1), (2, 3), (3, 1)])
def test_loss_and_gradient_equal_appendix_c(batch, n, weighting, anchor, scale, graphs):
    policy, reference, given, beta = Toy(1), Toy(2), preference(batch, n), 3.0
    numel, (win, lose, cond, t, noise) = given["win"][0].numel(), given.values()
    pairs = []
    for b in range(batch):
        one, weight = slice(b, b + 1), 1 if weighting == "x0" else t[b] ** -2
        for k in range(n):                                 # the paper's errors are sums, ours means: β_sum = β / numel
            pairs.append(appendix_c(policy, reference, win[one], lose[one, k], Condition(*(x[one] for x in cond)),
                                    t[one], noise[one], beta / numel, weight))
    z, *errors = torch.stack(pairs, dim=1)
    win_error, lose_error, ref_win_error, ref_lose_error = (e.mean() / numel for e in errors)
    align = -torch.log(torch.sigmoid(z)).mean()
    expected = scale * align + anchor * win_error
    gradient = parameters_to_vector(torch.autograd.grad(expected, list(policy.parameters())))

    loss, metrics = loss_by(graphs)(policy, reference, **given, beta=beta, weighting=weighting, anchor=anchor,
                                      scale=scale)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    assert relative(parameters_to_vector(p.grad for p in policy.parameters()), gradient) <= 2e-5
    assert all(p.grad is None for p in reference.parameters())
    for name, value in dict(preference=align, margin=z.mean(), accuracy=(z > 0).float().mean(), win=win_error,
                            lose=lose_error, ref_win=ref_win_error, ref_lose=ref_lose_error).items():
        assert not metrics[name].requires_grad
        torch.testing.assert_close(metrics[name], value.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("graphs", ["all", "two", "one"])
def test_first_loss_is_exactly_log_2(denoiser, graphs):
    given = preference(2, 3)
    del given["t"], given["noise"]                         # drawn, but the same for policy and reference
    loss, metrics = loss_by(graphs)(denoiser, copy.deepcopy(denoiser), **given, beta=5000.0)
    assert loss.item() == torch.tensor(2.0).log().item()
    assert metrics["margin"] == metrics["accuracy"] == 0 and metrics["win"] == metrics["ref_win"] > 0


class Kept:
    """A tensor that a graph keeps for its backward pass."""

    def __init__(self, tensor):
        self.tensor = tensor


class Watched(nn.Module):
    """A denoiser of one weight that notes how many videos each call has, and how many of its graphs are alive."""

    def __init__(self):
        super().__init__()
        self.weight, self.alive, self.most, self.calls = nn.Parameter(torch.tensor(0.5)), WeakSet(), 0, []

    def forward(self, x_t, cond, t):
        def keep(tensor):
            kept = Kept(tensor)
            self.alive.add(kept)
            return kept

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept.tensor):
            out = x_t * self.weight
        self.calls.append(len(x_t))
        self.most = max(self.most, len(self.alive))
        return out


@pytest.mark.parametrize("graphs, alive, policy_calls, reference_calls", [
    ("all", 1, [4], [4]), ("two", 2, [1, 1, 1, 1], [1, 1, 1, 1]), ("one", 1, [1, 1, 1, 1, 1], [1, 1, 1, 1])])
def test_so_many_graphs_are_alive_at_a_time(graphs, alive, policy_calls, reference_calls):
    """Of a win and three negatives: all four in one batch, or two, or one at the price of one more forward pass."""
    policy, reference = Watched(), Watched()
    loss, _ = loss_by(graphs)(policy, reference, **preference(1, 3), beta=1.0)
    loss.backward()
    assert (policy.most, policy.calls) == (alive, policy_calls)
    assert (reference.most, reference.calls) == (0, reference_calls)


def test_velocity_weighting_is_the_squared_error_of_the_velocity():
    policy, (win, cond), t, noise = Toy(1), inputs(3), torch.tensor([0.02, 0.5, 1.0]), randn(3, 4, 5, 4, 6, seed=3)
    x_t = realdpo.add_noise(win, noise, t)
    velocity = (x_t - policy(x_t, cond, t)) / realdpo.per_sample(t, x_t)
    loss, metrics = realdpo.sft_loss(policy, win=win, cond=cond, t=t, noise=noise, weighting="velocity")
    torch.testing.assert_close(loss, (velocity - (noise - win)).square().mean(), rtol=1e-5, atol=0)
    assert metrics["win"] == loss and not metrics["win"].requires_grad


def test_drawn_t_is_uniform_and_never_zero(monkeypatch):
    seen, win = [], torch.zeros(20_000, 1, 1, 1, 1)

    def identity(x_t, cond, t):
        seen.append((x_t, t))
        return x_t

    draw = partial(realdpo.sft_loss, identity, win=win, cond=Condition(win, win))
    torch.manual_seed(0)
    draw()
    x_t, t = seen.pop()
    assert t.min() < 0.001 and t.max() > 0.999 and abs(t.mean() - 0.5) < 0.01
    assert abs((x_t.flatten() / t).std() - 1) < 0.03       # x₀ = 0, so x_t = t·ε
    for extreme in (0.0, 1 - 2 ** -24):                    # all that rand may return
        monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.full(shape, extreme))
        draw()
        x_t, t = seen.pop()
        assert 0 < t.min() <= t.max() <= 1


@pytest.mark.parametrize("weighting", ["x0", "velocity"])
def test_reward_weighted_regression_is_a_weighted_mean_of_errors(weighting):
    videos, cond = randn(2, 3, 4, 1, 2, 2), Condition(randn(2, 1, 1), randn(2, 4, 1, 2, 2))
    t, noise = torch.tensor([0.3, 0.8]), randn(2, 4, 1, 2, 2, seed=1)
    scores = torch.tensor([[0.0, 1.0, -2.0], [5.0, 5.0, 5.0]])

    def half(x_t, cond, t):
        return 0.5 * x_t

    expected = 0
    for b in range(2):
        shares = torch.exp(scores[b] / 0.5) / torch.exp(scores[b] / 0.5).sum()
        for share, video in zip(shares, videos[b]):
            x_t = (1 - t[b]) * video + t[b] * noise[b]
            weight = 1 if weighting == "x0" else t[b] ** -2
            expected += share * weight * (video - 0.5 * x_t).square().mean() / 2
    loss, metrics = realdpo.rwr_loss(half, videos=videos, scores=scores, temperature=0.5, cond=cond, t=t, noise=noise,
                                     weighting=weighting)
    assert loss.item() == metrics["win"].item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_best_and_the_worst_video_are_those_of_the_extreme_scores():
    videos = randn(2, 3, 4, 1, 2, 2)
    best, worst = realdpo.best_and_worst(videos, torch.tensor([[0.0, 1.0, -2.0], [3.0, -1.0, 1.0]]))
    assert torch.equal(best, torch.stack([videos[0, 1], videos[1, 0]]))
    assert torch.equal(worst, torch.stack([videos[0, 2:], videos[1, 1:2]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ema_equals_its_closed_form_and_the_next_reference_forward_uses_it(dtype):
    def vector(net):
        return parameters_to_vector(net.parameters()).detach().float().clone()

    def ref_win(net):
        return realdpo.realdpo_loss(Toy(1), net, **preference(2, 1), beta=1.0)[1]["ref_win"]

    policy, reference, closed, trail = Toy(1).to(dtype), Toy(2), Toy(2), []
    expected = 0.9 ** 4 * vector(reference)
    for i in range(4):
        trail.append(vector(scramble(policy, seed=i)))
        expected += 0.1 * 0.9 ** (3 - i) * trail[i]
        realdpo.ema_update(reference, policy, 0.9)
    torch.testing.assert_close(vector(reference), expected)
    assert torch.equal(vector(policy), trail[-1])
    vector_to_parameters(expected, closed.parameters())
    torch.testing.assert_close(ref_win(reference), ref_win(closed))
    assert abs(ref_win(reference) - ref_win(Toy(2))) > 1e-3


# ---- The networks, against the libraries that they reimplement ------------------------------------------------------

@pytest.fixture
def make_oracle(diffusers, tmp_path):
    """make_oracle(scheduler changes, **transformer changes) -> diffusers' transformer and scheduler, our denoiser of
    the same files."""
    def make(scheduler={}, **changes):
        net = scramble(diffusers.CogVideoXTransformer3DModel(**public(DIT) | changes))
        scheduler = diffusers.CogVideoXDDIMScheduler.from_config(SCHEDULER | scheduler)
        net.save_pretrained(tmp_path / "transformer")
        scheduler.save_pretrained(tmp_path / "scheduler")
        return net, scheduler, model.load_dit(tmp_path)
    return make


@torch.no_grad()
def oracle_output(net, z, cond, k):
    """diffusers' transformer on latents z (B,C,F,H,W) at training steps k (B,), with the rotary table its pipeline
    makes."""
    from diffusers.models.embeddings import get_3d_rotary_pos_embed
    frames, *grid = z.shape[2], *(n // net.config.patch_size for n in z.shape[3:])
    rope = get_3d_rotary_pos_embed(net.config.attention_head_dim, ((0, 0), grid), grid, frames)
    if net.config.use_learned_positional_embeddings:       # for fewer frames diffusers would forget the learned table
        net.patch_embed.sample_frames = (frames - 1) * net.config.temporal_compression_ratio + 1
        net.patch_embed.pos_embedding = net.patch_embed.pos_embedding[:, :cond.text.shape[1] + frames * math.prod(grid)]
    x = torch.cat([z, nnf.pad(cond.image, (0, 0, 0, 0, 0, frames - 1))], dim=1)
    return net(x.transpose(1, 2), cond.text, k, image_rotary_emb=rope, return_dict=False)[0].transpose(1, 2)


def time_of(scheduler, k):
    """t of training steps k: (1 − t) : t = α : σ."""
    alpha, sigma = scheduler.alphas_cumprod[k].sqrt(), (1 - scheduler.alphas_cumprod[k]).sqrt()
    return sigma / (alpha + sigma)


@pytest.mark.parametrize("changes, batch, frames, size, steps", [
    ({}, 1, 5, (4, 6), [0]),
    ({}, 2, 5, (4, 6), [999, 0]),
    ({}, 3, 3, (4, 6), [1, 500, 998]),
    ({}, 1, 1, (4, 6), [999]),
    (dict(num_attention_heads=3, attention_head_dim=64, num_layers=1), 2, 2, (4, 6), [250, 750]),
    (dict(num_layers=5, sample_height=8, sample_width=2, sample_frames=9), 1, 3, (8, 2), [20]),
    (dict(use_learned_positional_embeddings=False), 1, 4, (8, 10), [600]),
    (dict(in_channels=32, out_channels=16, text_embed_dim=20, max_text_seq_length=1, time_embed_dim=8),
     2, 5, (4, 6), [3, 3]),
])
def test_denoiser_equals_diffusers(make_oracle, changes, batch, frames, size, steps):
    net, scheduler, denoiser = make_oracle(**changes)
    x_t, cond = inputs(batch, frames, *size, c=DIT | changes)
    k = torch.tensor(steps)
    t = time_of(scheduler, k)
    alpha, sigma = scheduler.alphas_cumprod[k].sqrt(), (1 - scheduler.alphas_cumprod[k]).sqrt()
    # the same mixture up to a factor s
    alpha, sigma, s = (realdpo.per_sample(c, x_t) for c in (alpha, sigma, ((1 - t) ** 2 + t ** 2).sqrt()))
    z = (x_t / s).float()
    with torch.no_grad():
        assert relative(denoiser(x_t, cond, t), alpha * z - sigma * oracle_output(net, z, cond, k)) <= 2e-5


def test_flow_denoiser_subtracts_the_velocity_diffusers_predicts(make_oracle, tmp_path):
    net, _, _ = make_oracle()
    rewrite(tmp_path / "scheduler" / "scheduler_config.json", _class_name="FlowMatchEulerDiscreteScheduler")
    (x_t, cond), t = inputs(2), torch.tensor([0.25, 1.0])
    expected = x_t - realdpo.per_sample(t, x_t) * oracle_output(net, x_t, cond, 1000 * t)
    with torch.no_grad():
        assert relative(model.load_dit(tmp_path)(x_t, cond, t), expected) <= 2e-5


@torch.no_grad()
def test_only_the_network_computes_in_bf16(folder, denoiser):
    (x_t, cond), half = inputs(2), model.load_dit(folder, dtype=torch.bfloat16)
    for t in (torch.tensor([0.3, 0.9]), torch.tensor([1e-4, 1e-4])):
        ours, exact = half(x_t, cond, t), denoiser(x_t, cond, t)
        assert ours.dtype == torch.float32
        change = (exact - x_t).abs().max()                 # little at t = 0.0001: then x_t itself must not be rounded
        assert 0 < (ours - exact).abs().max() < 0.05 * change
    inside = half.net.transformer_blocks[0].attn1.to_q.weight
    assert inside.dtype == torch.bfloat16


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("grid, head_dim", [((13, 30, 45), 64), ((5, 4, 4), 32), ((1, 2, 3), 16)])
def test_rope_equals_diffusers_and_leaves_text_alone(diffusers, grid, head_dim, compiling, monkeypatch):
    from diffusers.models.embeddings import apply_rotary_emb, get_3d_rotary_pos_embed
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)               # the form for the compiler
    theirs = get_3d_rotary_pos_embed(head_dim, ((0, 0), grid[1:]), grid[1:], grid[0])
    q = randn(1, 2, 3 + math.prod(grid), head_dim)
    turned = model.rotate(q.transpose(1, 2), model.rope_table(grid, 3, head_dim, torch.device("cpu"))).transpose(1, 2)
    assert torch.equal(turned[:, :, :3], q[:, :, :3])
    assert relative(turned[:, :, 3:], apply_rotary_emb(q[:, :, 3:], theirs)) <= 2e-5


def block_gradients(block, checkpointing=False):
    """What a small block gives for two samples, and the gradients of its inputs and parameters."""
    inputs = [randn(2, 7, 32, seed=1), randn(2, 12, 32, seed=2), randn(2, 24, seed=3)]
    for x in inputs:
        x.requires_grad_()
    out = block(*inputs, model.rope_table((2, 2, 3), 7, 16, torch.device("cpu")), checkpointing)
    block.zero_grad()
    sum(x.square().sum() for x in out).backward()
    results = [x.detach() for x in out] + [x.grad for x in inputs]
    for p in block.parameters():
        results.append(p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad)
    return results


@pytest.mark.parametrize("how, attentions", [(False, 1), (True, 2), ("selective", 1)])
def test_checkpointing_recomputes_blocks_and_keeps_the_gradient(how, attentions):
    torch.manual_seed(0)
    block, products = model.Block(32, 2, 24, 1e-5), []
    block.ff["net"][2].register_forward_pre_hook(lambda *_: products.append(1))
    expected = block_gradients(block)
    products.clear()
    with Count(carried) as count:
        for ours, theirs in zip(block_gradients(block, how), expected, strict=True):
            assert torch.equal(ours, theirs)
    assert len(products) == (2 if how else 1)              # a matrix product, in the backward pass again
    assert count.calls["_scaled_dot_product_flash_attention_for_cpu"] == attentions


def test_checkpointing_of_a_denoiser_is_that_of_its_blocks(denoiser, monkeypatch):
    asked, layers = [], model.Block.forward

    def spy(block, *arguments):
        asked.append(arguments[-1])
        return layers(block, *arguments)

    monkeypatch.setattr(model.Block, "forward", spy)
    for denoiser.checkpointing in (False, "selective", True):
        denoiser(*inputs(2), torch.tensor([0.3, 0.9]))
    assert asked == [False, False, "selective", "selective", True, True]


def counted(calls, name):
    """A compiler that runs a graph as it is and notes how often it computes attention forward."""
    def compile(graph, inputs):
        attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
        # A recomputed one is an argument of an operator that restores the generator.
        calls[name] = sum(any(x is attention for x in (node.target, *node.args)) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)
    return compile


@pytest.mark.slow
@pytest.mark.parametrize("how, attentions", [(True, (1, 1)), ("selective", (1, 0))])
def test_a_block_compiles_whole_and_keeps_what_selective_checkpointing_keeps(how, attentions):
    torch.manual_seed(0)
    block, calls = model.Block(32, 2, 24, 1e-5), {}
    expected = block_gradients(block)
    torch.compiler.reset()
    backend = aot_autograd(fw_compiler=counted(calls, "forward"), bw_compiler=counted(calls, "backward"),
                           partition_fn=min_cut_rematerialization_partition)
    block.forward = torch.compile(block.forward, fullgraph=True, backend=backend)
    for ours, theirs in zip(block_gradients(block, how), expected, strict=True):
        assert relative(ours, theirs) <= 2e-5
    assert (calls["forward"], calls["backward"]) == attentions


def sharded_block(rank, folder, expected):
    """A block, compiled and sharded as one of two processes, against one that is neither."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    net = nn.Module()
    net.transformer_blocks = nn.ModuleList([model.Block(32, 2, 24, 1e-5)])
    torch.compile = partial(torch.compile, backend="aot_eager")
    model.DiT.compile_blocks(net)
    block = fully_shard(net.transformer_blocks[0], mesh=init_device_mesh("cpu", (2,)))
    for ours, theirs in zip(block_gradients(block, "selective"), expected, strict=True):
        assert relative(ours, theirs) <= 2e-5
    assert all(isinstance(p, DTensor) for p in block.parameters())
    dist.destroy_process_group()


@pytest.mark.slow
def test_a_sharded_block_compiles_whole_on_two_ranks(tmp_path):
    torch.manual_seed(0)
    block = model.Block(32, 2, 24, 1e-5)
    mp.spawn(sharded_block, nprocs=2, args=(tmp_path, block_gradients(block)))


@pytest.fixture(scope="module")
def vaes(diffusers, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    net = scramble(diffusers.AutoencoderKLCogVideoX(**public(VAE)))
    net.save_pretrained(folder / "vae")
    return net, model.load_vae(folder)


@pytest.mark.parametrize("batch, frames, piece_size", [(1, 1, None), (1, 9, None), (2, 17, None), (1, 49, None),
                                                       (1, 17, 1), (2, 9, 6000)])
def test_vae_equals_diffusers(vaes, batch, frames, piece_size, monkeypatch):
    theirs, ours = vaes
    if piece_size:                                         # a frame at a time, or a few: nothing but memory changes
        monkeypatch.setattr(model.CausalConv3d, "piece_size", piece_size)
    video = randn(batch, 3, frames, 16, 24).clamp(-1, 1)
    with torch.no_grad():
        posterior = theirs.encode(video).latent_dist
        noisy = 0.7 * posterior.sample(torch.Generator().manual_seed(5))
        decoded = theirs.decode(noisy / 0.7).sample
    sampled = ours.encode(video, torch.Generator().manual_seed(5))
    assert relative(ours.encode(video), 0.7 * posterior.mean) <= 2e-4
    assert relative(sampled, noisy) <= 2e-4
    assert relative(ours.decode(noisy), decoded) <= 2e-4
    assert not sampled.requires_grad and not ours.decode(noisy).requires_grad            # no graph is kept


@torch.no_grad()
def test_the_posterior_is_as_wide_and_as_narrow_as_in_diffusers(vaes):
    theirs, ours = copy.deepcopy(vaes)
    for net in (theirs, ours):                             # logarithms of variances from -40 to 40
        net.encoder.conv_out.conv.weight.zero_()
        net.encoder.conv_out.conv.bias[6:] = torch.linspace(-40, 40, 6)
    video = torch.zeros(1, 3, 1, 16, 24)
    torch.testing.assert_close(ours.posterior(video)[1], theirs.encode(video).latent_dist.std)


def test_the_vae_can_be_trained_as_in_diffusers(vaes):
    """With a graph, nothing may be overwritten: the gradient of a loss on what comes back."""
    theirs, ours = vaes
    video, gradients = randn(1, 3, 9, 16, 24).clamp(-1, 1), []
    theirs.zero_grad()
    theirs.decode(theirs.encode(video).latent_dist.mean).sample.square().mean().backward()
    mean, _ = ours.posterior(video)
    past = {}
    parts = [ours.decoder(mean[:, :, part], past) for part in model.chunks(mean.shape[2], 2)]
    ours.zero_grad()
    torch.cat(parts, dim=2).square().mean().backward()
    for net in (ours, theirs):
        found = dict(net.named_parameters())
        gradients.append(torch.cat([found[name].grad.flatten() for name in sorted(found)]))
    assert relative(*gradients) <= 1e-3


@torch.no_grad()
def test_the_norm_in_two_parts_is_group_norm_even_of_a_constant():
    ours, theirs = scramble(model.Norm(4, 8, eps=1e-6)), scramble(nn.GroupNorm(4, 8, eps=1e-6)).double()

    def difference(x):
        return (model.affine(x, *ours.scale_and_shift(x, None)) - theirs(x.double())).abs().max()

    assert difference(randn(2, 8, 9, 40, 60) + 3) <= 1e-5
    assert difference(randn(2, 8, 9, 40, 60) + 100) <= 2e-3
    for value in range(1, 10):
        assert difference(torch.full((1, 8, 9, 40, 60), float(value))) <= 1e-3
        # Whose mean is rounded, so that its variance may come out as less than nothing.
        assert difference(torch.full((1, 8, 9, 40, 60), value * 100 / 7)) <= 0.1


@pytest.mark.parametrize("length", [7, 226])
def test_text_encoder_equals_transformers(copied, length):
    transformers = pytest.importorskip("transformers")
    shutil.rmtree(copied / "text_encoder")
    net = scramble(transformers.T5EncoderModel(transformers.T5Config(**T5)))
    net.save_pretrained(copied / "text_encoder")
    rewrite(copied / CONFIG, max_text_seq_length=length)
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(copied / "tokenizer" / "spiece.model"))
    ids = [tokenizer.encode(prompt)[:length - 1] + [1] for prompt in PROMPTS]
    assert ids[1] == [1] and len(ids[-1]) == length        # the empty and the over-long
    with torch.no_grad():
        expected = net(torch.tensor([row + [0] * (length - len(row)) for row in ids])).last_hidden_state
    ours = model.load_text_encoder(copied)(PROMPTS)
    assert relative(ours, expected) <= 2e-5 and not ours.requires_grad


@pytest.mark.parametrize("shard_bytes", [None, 20_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_transformer_opens_in_diffusers_and_here(diffusers, make_oracle, tmp_path, dtype, shard_bytes,
                                                       monkeypatch):
    net, scheduler, denoiser = make_oracle()
    saved = tmp_path / "saved"
    if shard_bytes:
        save = partial(huggingface_hub.save_torch_state_dict, max_shard_size=shard_bytes)
        monkeypatch.setattr(huggingface_hub, "save_torch_state_dict", save)
    model.save_dit(denoiser, saved, dtype)
    assert (len(list(saved.rglob("*.safetensors"))) > 2) == bool(shard_bytes)
    opened, info = diffusers.CogVideoXTransformer3DModel.from_pretrained(
        saved / "transformer", output_loading_info=True, torch_dtype=dtype)
    opened_scheduler = diffusers.CogVideoXDDIMScheduler.from_pretrained(saved / "scheduler")
    assert not any(info.values()), info                    # missing, unexpected and mismatched keys
    assert public(opened.config) == public(net.config) and public(opened_scheduler.config) == public(scheduler.config)
    expected = {name: x.to(dtype) for name, x in net.state_dict().items()}
    for state in opened.state_dict(), model.load_dit(saved, dtype=dtype).net.state_dict():
        torch.testing.assert_close(dict(state), expected, rtol=0, atol=0, check_dtype=False)


PUBLISHED_SHAPES = {
    model.DiT: {
        "patch_embed.pos_embedding": (1, 17776, 3072), "patch_embed.proj.weight": (3072, 32, 2, 2),
        "patch_embed.text_proj.weight": (3072, 4096),
        "time_embedding.linear_1.weight": (512, 3072), "time_embedding.linear_2.weight": (512, 512),
        "norm_final.bias": (3072,), "norm_out.linear.weight": (6144, 512), "norm_out.norm.weight": (3072,),
        "proj_out.weight": (64, 3072), "proj_out.bias": (64,),
        "transformer_blocks.0.norm1.linear.weight": (18432, 512), "transformer_blocks.41.norm2.norm.bias": (3072,),
        "transformer_blocks.0.attn1.norm_q.weight": (64,), "transformer_blocks.0.attn1.norm_k.bias": (64,),
        "transformer_blocks.0.attn1.to_q.weight": (3072, 3072), "transformer_blocks.0.attn1.to_out.0.bias": (3072,),
        "transformer_blocks.0.ff.net.0.proj.weight": (12288, 3072),
        "transformer_blocks.0.ff.net.2.weight": (3072, 12288)},
    model.VAE: {
        "encoder.conv_out.conv.weight": (32, 512, 3, 3, 3),
        "encoder.down_blocks.0.downsamplers.0.conv.weight": (128, 128, 3, 3),
        "encoder.down_blocks.1.resnets.0.conv_shortcut.weight": (256, 128, 1, 1, 1),
        "encoder.mid_block.resnets.1.norm2.weight": (512,),
        "decoder.up_blocks.2.upsamplers.0.conv.weight": (256, 256, 3, 3), "decoder.norm_out.norm_layer.weight": (128,),
        "decoder.up_blocks.3.resnets.3.norm1.conv_y.conv.weight": (128, 16, 1, 1, 1)},
    model.T5Encoder: {
        "shared.weight": (32128, 4096),
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (32, 64),
        "encoder.block.23.layer.1.DenseReluDense.wi_1.weight": (10240, 4096),
        "encoder.final_layer_norm.weight": (4096,)}}


@pytest.mark.parametrize("network, config, names, parameters, buffers", [
    (model.DiT, FULL_DIT, 1025, 5_570_479_680, 54_607_872),
    (model.VAE, FULL_VAE, 436, 215_583_907, 0),
    (model.T5Encoder, FULL_T5, 219, 4_762_310_656, 0)])
def test_published_names_shapes_and_counts(network, config, names, parameters, buffers):
    with torch.device("meta"):
        net = network(config)
    shapes = {name: tuple(x.shape) for name, x in net.state_dict().items()}
    assert len(shapes) == names
    assert sum(x.numel() for x in net.parameters()) == parameters
    assert sum(x.numel() for x in net.buffers()) == buffers
    assert {name: shapes.get(name) for name in PUBLISHED_SHAPES[network]} == PUBLISHED_SHAPES[network]


# ---- Sampling: the solvers ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("steps, scheduler", [(5, {}), (20, {}), (50, {}), (20, dict(snr_shift_scale=3.0))])
def test_sampler_equals_diffusers_ddim_with_guidance(make_oracle, steps, scheduler):
    net, scheduler, denoiser = make_oracle(scheduler, num_layers=1)
    noise, cond = inputs(2, frames=3)
    empty = randn(1, *cond.text.shape[1:], seed=9)
    both = Condition(torch.cat([empty.expand_as(cond.text), cond.text]), torch.cat([cond.image, cond.image]))
    scheduler.set_timesteps(steps)
    z = noise
    for k in scheduler.timesteps:
        without, with_caption = oracle_output(net, torch.cat([z, z]), both, k.expand(4)).chunk(2)
        z = scheduler.step(without + 6 * (with_caption - without), k, z, return_dict=False)[0]
    ours = realdpo.sample(denoiser, noise, cond, steps=steps, guidance=6.0, uncond=empty, progress=False)
    assert relative(ours, z) <= 1e-3 and not ours.requires_grad


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_times_are_those_of_the_training_steps_and_of_diffusers_timesteps(diffusers, shift):
    config = SCHEDULER | dict(snr_shift_scale=shift)
    scheduler, prediction = diffusers.CogVideoXDDIMScheduler.from_config(config), model.VPrediction(config)
    t = time_of(scheduler, torch.arange(1000)).double()
    torch.testing.assert_close(prediction.step(t), torch.arange(1000.0, dtype=torch.float64), rtol=0, atol=2e-3)
    between = prediction.step((t[1:] + t[:-1]) / 2)
    torch.testing.assert_close(between, torch.arange(999.0, dtype=torch.float64) + 0.5, rtol=0, atol=2e-3)
    for steps in (*range(1, 1001, 2), 4, 8, 10, 20, 50, 100):          # others have halves, to be rounded either way
        scheduler.set_timesteps(steps)
        theirs = scheduler.timesteps[:steps]               # 61, 103 … have one too many: 1000 / (1000 / 61) > 61
        torch.testing.assert_close(prediction.time_grid(steps), torch.cat([t[theirs], torch.zeros(1).double()]),
                                   rtol=0, atol=1e-6)


PREDICTIONS = pytest.mark.parametrize("prediction", [model.FlowPrediction(), model.VPrediction(SCHEDULER)],
                                      ids=["flow", "cogvideox"])


@PREDICTIONS
def test_every_number_of_steps_has_its_falling_times(prediction):
    for steps in range(1, 1001):
        times = prediction.time_grid(steps)
        assert len(times) == steps + 1 and (times.diff() < 0).all() and times[0] == 1 and times[-1] == 0


def test_t_min_is_the_first_training_step(denoiser):
    t = torch.tensor([denoiser.t_min - 0.01, denoiser.t_min, denoiser.t_min + 0.01], dtype=torch.float64)
    before, at, after = denoiser.prediction.step(t).tolist()
    assert before == at == 0 < after and denoiser.t_min == pytest.approx(0.0283, abs=1e-4)
    assert model.FlowPrediction.t_min == 0


class Known:
    """A denoiser given by a formula, x̂₀ = predict(x_t, t), on the time grid of a network's prediction."""

    def __init__(self, predict, prediction=model.FlowPrediction()):
        self.predict, self.time_grid, self.calls = predict, prediction.time_grid, 0

    def __call__(self, x_t, cond, t):
        self.calls += 1
        return self.predict(x_t, realdpo.per_sample(t, x_t))


def posterior_mean(mean, std):
    """E[x₀ | x_t] for x₀ ~ ½·N(−mean, std²) + ½·N(mean, std²), the exact denoiser of such data."""
    def predict(x_t, t):
        variance = (1 - t) ** 2 * std ** 2 + t ** 2
        gain = (1 - t) * std ** 2 / variance
        return gain * x_t + mean * (1 - gain * (1 - t)) * torch.tanh((1 - t) * mean * x_t / variance)
    return predict


def solve(denoiser, steps, solver="euler"):
    noise, cond = inputs(4)
    return realdpo.sample(denoiser, noise, cond, steps=steps, guidance=1, solver=solver, progress=False)


@PREDICTIONS
def test_euler_converges_to_the_flow_of_a_gaussian(prediction):
    exact = 0.5 * inputs(4)[0]                             # the flow of N(0, std²) only rescales: x₀ = std·x₁
    errors = [relative(solve(Known(posterior_mean(0, 0.5), prediction), steps), exact) for steps in (100, 200, 1000)]
    assert errors[2] < 0.01 and 1.6 < errors[0] / errors[1] < 2.4


@pytest.mark.parametrize("solver, order", [("euler", 1), ("multistep", 2)])
def test_half_the_step_is_half_the_error_or_a_quarter_of_it(solver, order):
    exact = 0.5 * inputs(4)[0]
    coarse, fine = (relative(solve(Known(posterior_mean(0, 0.5)), steps, solver), exact) for steps in (200, 400))
    assert coarse / fine == pytest.approx(2 ** order, rel=0.15) and fine < 0.1 ** (2 * order)


@PREDICTIONS
@pytest.mark.parametrize("steps", [2, 3, 8])
def test_multistep_is_exact_where_the_velocity_is_linear_in_time(prediction, steps):
    """v(t) = a + b·t: the predictor extends a line and the corrector is the trapezoid, so only both together are exact
    from the first step on."""
    a, b, noise = 0.7, -1.3, inputs(4)[0]
    x = solve(Known(lambda x_t, t: (x_t - t * (a + b * t)).float(), prediction), steps, "multistep")
    torch.testing.assert_close(x, noise - (a + b / 2), rtol=0, atol=1e-5)


@PREDICTIONS
@pytest.mark.parametrize("mean, std", [(0, 1), (1, 1), (2, 1), (0, 0.3), (1, 0.5)])
def test_multistep_with_25_steps_beats_euler_with_50(prediction, mean, std):
    multistep, euler = distances(Known(posterior_mean(mean, std), prediction), *inputs(4))
    assert multistep < euler / 2


@pytest.mark.parametrize("solver", ["euler", "multistep"])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_sampler_lands_on_a_constant_prediction_in_so_many_evaluations(solver, steps):
    denoiser = Known(lambda x_t, t: torch.full_like(x_t, 3.0))
    x = solve(denoiser, steps, solver)
    torch.testing.assert_close(x, torch.full_like(x, 3.0))
    assert denoiser.calls == steps


@torch.no_grad()
def test_guidance_mixes_caption_and_empty_caption_under_the_same_image():
    denoiser, (noise, cond), (_, other), t = Toy(1), inputs(2), inputs(2, seed=7), torch.ones(2)
    with_caption, without = denoiser(noise, cond, t), denoiser(noise, Condition(other.text, cond.image), t)
    for uncond in (other, other.text):
        x = realdpo.sample(denoiser, noise, cond, steps=1, guidance=4.0, uncond=uncond, progress=False)
        torch.testing.assert_close(x, without + 4 * (with_caption - without))


# ---- Sampling: what the commands ask of it --------------------------------------------------------------------------

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
    assert len(asked) == len(records) == 4
    for call, record in zip(asked, records):
        assert torch.equal(call["cond"].text, record["text"].expand(3, -1, -1))
        assert torch.equal(call["cond"].image, record["image"].expand(3, -1, -1, -1, -1))
        assert torch.equal(call["uncond"][0], empty.bfloat16())
        assert (call["steps"], call["guidance"], call["solver"], call["progress"]) == (7, 2.5, "euler", False)
        assert torch.equal(record["lose"], call["noise"].bfloat16())               # stored as the sampler gives it
    assert_unrelated(torch.cat([call["noise"] for call in asked]))
    policy, base = asked[0]["denoiser"].net.state_dict(), model.load_dit("tiny").net.state_dict()
    assert same_tensors(policy, base)


def test_videos_of_a_bench_are_asked_for_with_their_own_picture_and_caption(shots, asked, tmp_path):
    options = dict(model="tiny", bench=str(shots), steps=7, guidance=2.5, solver="multistep", samples=2, frames=9)
    sample.main(sample.Options(out=str(tmp_path / "a"), **options))
    sample.main(sample.Options(out=str(tmp_path / "b"), **options, seed=1))
    encode_text, vae = model.load_text_encoder("tiny"), model.load_vae("tiny")
    prompts, _ = sample.read_bench(shots)
    assert len(asked) == 2 * 2 * len(prompts)
    for call, prompt in zip(asked, [prompt for prompt in prompts for _ in range(2)] * 2):
        assert torch.equal(call["cond"].text, encode_text([prompt.caption]))
        mean = vae.encode(data.read_image(prompt.file, 32, 32)[None])              # a sample of its posterior
        assert 0 < relative(call["cond"].image, mean) < 0.2
        assert torch.equal(call["uncond"], encode_text([""]))
        assert (call["steps"], call["guidance"], call["solver"], call["progress"]) == (7, 2.5, "multistep", False)
    assert_unrelated(torch.cat([call["noise"] for call in asked]))         # of each sample, picture and seed its own
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
    torch.testing.assert_close(one[0], two[0], atol=0.02, rtol=0.02)       # a batch of another size rounds differently
    assert not torch.equal(two[0], two[1])


def test_where_memory_is_short_negatives_are_made_one_by_one(own_cache, asked, monkeypatch):
    usual = data.Records(own_cache)[0]["lose"].shape
    shutil.rmtree(own_cache / "lose")
    monkeypatch.setattr(sample, "free_memory", lambda device: sample.THREE_AT_ONCE)
    add_negatives(own_cache)
    assert [len(call["noise"]) for call in asked] == [1] * 8 == [len(call["cond"].text) for call in asked]
    record = data.Records(own_cache)[0]["lose"]
    assert record.shape == usual and torch.equal(record, torch.cat([call["noise"] for call in asked[:2]]).bfloat16())


def test_negatives_of_another_caption_are_refused(videos, tmp_path, capsys):
    folder, out = shutil.copytree(videos, tmp_path / "videos"), tmp_path / "cache"
    add_negatives(encode(folder, out))
    (folder / "00002.txt").write_text("a figure does something else")
    with pytest.raises(UserError, match="00002.safetensors: was made with other settings: caption"):
        encode(folder, out)
    (out / "win" / "00002.safetensors").unlink()           # as that message advises
    for name in ("00003.mp4", "00003.txt"):
        (folder / name).unlink()
    capsys.readouterr()
    encode(folder, out)
    assert "1 records are of clips that" in capsys.readouterr().out
    with pytest.raises(UserError, match="lose/00002.safetensors: was made with other settings: win"):
        add_negatives(out)
    with pytest.raises(UserError, match="lose/00002.safetensors: was made for another encoding of its clip"):
        data.Records(out)
    (out / "lose" / "00002.safetensors").unlink()
    assert len(data.Records(add_negatives(out))) == 4


def test_negatives_take_half_the_evaluations_of_a_published_video(monkeypatch):
    taken = []
    for action in "negatives", "make_videos":
        monkeypatch.setattr(sample, action, lambda options: taken.append((options.solver, options.steps)))
    for options in ({"data": "cache"}, {"image": "a.png"}, {"bench": "shots"}, {"data": "cache", "solver": "euler"},
                    {"data": "cache", "steps": 9}, {"image": "a.png", "solver": "multistep"}):
        sample.main(sample.Options(model="tiny", **options))
    assert taken == [("multistep", 25), ("euler", 50), ("euler", 50), ("euler", 50), ("multistep", 9),
                     ("multistep", 25)]


def test_one_picture_and_one_sentence_become_an_mp4_which_can_be_a_gif(picture, straight, tmp_path):
    video = make_video(tmp_path / "a.mp4", picture)
    data.write_video(tmp_path / "a.gif", video, 8)
    assert video.shape == (17, 32, 32, 3) and len(imageio.mimread(tmp_path / "a.gif")) == 17
    assert np.array_equal(make_video(tmp_path / "b.mp4", picture), video)
    assert not np.array_equal(make_video(tmp_path / "c.mp4", picture, seed=1), video)
    assert make_video(tmp_path / "d.mp4", picture, prompt="", frames=9, fps=4).shape == (9, 32, 32, 3)
    assert data.read_video_header(tmp_path / "d.mp4").seconds == pytest.approx(9 / 4, abs=0.02)
    # a training run is a model, too
    assert make_video(tmp_path / "e.mp4", picture, model=str(straight)).shape == video.shape


# ---- Training: what a step is made of -------------------------------------------------------------------------------

def test_an_epoch_is_every_record_once_in_an_order_of_its_own():
    def epochs(seed):                                      # six of seven records, in batches of three
        options, drawn = train.Options(batch=3, seed=seed), []
        for step in range(14):
            drawn += train.batch_indices(options, 7, step)
        return [tuple(drawn[begin:begin + 7]) for begin in range(0, 42, 7)]

    orders = epochs(seed=0) + epochs(seed=1)
    assert all(sorted(order) == list(range(7)) for order in orders)
    assert len({*orders}) == 12


def draw(seed=0, step=0, place=0, t_min=0.0, **options):
    """What `draw_sample` makes of a record whose negatives and noised images carry their numbers."""
    record = dict(win=torch.zeros(4, 5, 8, 8), lose=torch.arange(100.0), noised=torch.arange(100.0))
    options = train.Options(**dict(seed=seed, compare_every=1, t_draw="low") | options)
    return train.draw_sample(record, options, step, place, t_min)


@pytest.mark.parametrize("change", [dict(seed=1), dict(step=1), dict(place=1)], ids=str)
def test_all_that_is_drawn_depends_on_seed_step_and_place_alone(change):
    ours, again, other = draw(), draw(), draw(**change)
    assert ours.keys() == {"win", "lose", "image", "t", "noise"}
    assert same_tensors(ours, again)
    for name in ("t", "noise", "lose", "image"):
        assert not torch.equal(ours[name], other[name]), name


@pytest.mark.parametrize("t_draw, t_max", [("low", 0.6387), ("uniform", 1.0)])
def test_t_is_uniform_from_the_least_that_the_network_knows(t_draw, t_max):
    t = torch.stack([draw(place=place, t_min=0.2, t_draw=t_draw)["t"] for place in range(2000)])
    assert 0.2 < t.min() < 0.201 and t_max - 0.001 < t.max() <= t_max
    assert t.mean() == pytest.approx((0.2 + t_max) / 2, abs=0.01)
    assert_unrelated(torch.stack([draw(place=place)["noise"] for place in range(8)]))


def test_the_releases_t_are_those_of_its_first_500_training_steps():
    assert len(train.RELEASE_T) == 500 and (train.RELEASE_T.diff() > 0).all()
    assert train.RELEASE_T[0].item() == pytest.approx(0.0283, abs=1e-4)
    assert train.RELEASE_T[-1].item() == pytest.approx(train.LOW_T, abs=1e-4)
    t = torch.stack([draw(place=place, t_draw="release")["t"] for place in range(2000)])
    assert set(t.tolist()) <= set(train.RELEASE_T.tolist()) and len(t.unique()) > 400
    assert (t < 0.1).float().mean() == pytest.approx(0.026, abs=0.01)          # 0.12 of uniform ones below 0.6387
    assert t.mean() == pytest.approx(train.RELEASE_T.mean().item(), abs=0.01)


def test_negatives_are_drawn_evenly_without_repetition_and_for_realdpo_alone():
    drawn = torch.stack([draw(place=place, lose_per_step=60)["lose"] for place in range(50)])
    assert drawn.shape == (50, 60) and all(len(row.unique()) == 60 for row in drawn)
    assert drawn.mean() == pytest.approx(49.5, abs=2) and (drawn.min(), drawn.max()) == (0, 99)
    assert torch.equal(draw(lose_per_step=0)["lose"], torch.arange(100.0))
    assert torch.equal(draw(method="dpo")["lose"], torch.arange(100.0))        # which has scores in their order


def scored_batch():
    """Two samples of three negatives with scores, as a step stacks them."""
    given = preference(2, 3)
    cond = given.pop("cond")
    return given | dict(text=cond.text, image=cond.image, scores=torch.tensor([[0.0, 1.0, -2.0], [3.0, -1.0, 1.0]]))


@pytest.mark.parametrize("graphs, policy_calls", [("all", [8]), ("two", [2] * 4), ("one", [2] * 5)])
@pytest.mark.parametrize("weighting", ["x0", "velocity"])
def test_each_method_takes_its_loss_with_the_options_of_the_run(weighting, graphs, policy_calls):
    batch, given = scored_batch(), preference(2, 3)
    options = partial(train.Options, beta=3.0, anchor=0.7, compare_every=2, weighting=weighting, graphs=graphs)
    same = {name: given[name] for name in ("cond", "t", "noise")} | dict(weighting=weighting)
    best, worst = given["lose"][[0, 1], [1, 0]], given["lose"][[0, 1], [2, 1]][:, None]
    compare = partial(realdpo.realdpo_loss, Toy(1), Toy(2), beta=3.0, **same)
    expected = {
        "realdpo": compare(win=given["win"], lose=given["lose"], anchor=0.7, scale=2),
        "dpo": compare(win=best, lose=worst, anchor=0.0),
        "sft": realdpo.sft_loss(Toy(1), win=given["win"], **same),
        "rwr": realdpo.rwr_loss(Toy(1), videos=given["lose"], scores=batch["scores"], **same)}
    for method, (loss, numbers) in expected.items():
        our_loss, our_numbers = train.loss_of(Toy(1), Toy(2), batch, options(method=method))
        torch.testing.assert_close(our_loss, loss)
        assert our_numbers.keys() == numbers.keys()
    policy = Watched()
    train.loss_of(policy, Watched(), batch, options(method="realdpo"))
    assert policy.calls == policy_calls


def test_the_console_says_a_step_in_a_line_of_100_columns():
    numbers = dict(loss=1.2345, win=0.01, ref_win=0.0123, lose=0.1, ref_lose=0.05, margin=2.345, accuracy=1.0, lr=5e-5,
                   seconds=7.612, mfu=0.384)
    line = train.console_line(6249, numbers)
    assert line == ("step 6249  loss 1.23  win -2.3e-03  lose +5.0e-02  margin 2.35  acc 1.00  lr 5e-05  7.61 s  "
                    "mfu 38%")
    assert len(line) <= 100


@pytest.mark.parametrize("steps, warmup, decay, rates", [
    (5, 2, 0.0, [0.5, 1, 1, 1, 1]),
    (10, 2, 0.4, [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]),
    (4, 0, 1.0, [1, 0.75, 0.5, 0.25]),
    (6, 4, 1.0, [1 / 4, 2 / 4, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),               # warm-up and fall meet
    (1, 1, 1.0, [1])])
def test_the_rate_rises_stays_and_falls(steps, warmup, decay, rates):
    options = train.Options(lr=2.0, warmup=warmup, decay=decay)
    assert [train.learning_rate(options, step, steps) / 2 for step in range(steps)] == pytest.approx(rates)


@pytest.fixture(scope="module")
def paced(cache):
    """Three steps at rates of 0.05, 0.1 and 0.1, the reference moved every second step. Returns the run and what its
    optimizer did: [(rate, weights before, gradient, weights after)], in fp64."""
    updates, update = [], torch.optim.AdamW.step

    def spy(optimizer, *arguments, **options):
        group = optimizer.param_groups[0]

        def vector(tensors):
            return torch.cat([tensor.to_local().detach().double().flatten() for tensor in tensors])

        rate, before, gradient = group["lr"], vector(group["params"]), vector(p.grad for p in group["params"])
        update(optimizer, *arguments, **options)
        updates.append((rate, before, gradient, vector(group["params"])))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "KEEP", 9)
        patch.setattr(torch.optim.AdamW, "step", spy)
        run_training(cache.parent / "paced", cache, steps=3, lr=0.1, warmup=2, ema_every=2, save_every=1, beta=500.0)
    return cache.parent / "paced", updates


def test_a_step_is_adamws_with_the_settings_that_cogvideox_was_trained_with(paced):
    """Loshchilov and Hutter 2019, Algorithm 2, in fp64, of a gradient whose norm is at most 1."""
    out, updates = paced
    lines, m, v = metrics(out), 0, 0
    assert [rate for rate, *_ in updates] == [0.05, 0.1, 0.1] == [line["lr"] for line in lines]
    for step, (rate, before, gradient, after) in enumerate(updates, start=1):
        assert gradient.norm() == pytest.approx(min(1, lines[step - 1]["grad_norm"]), rel=1e-4)
        m, v = 0.9 * m + 0.1 * gradient, 0.95 * v + 0.05 * gradient ** 2
        slope = (m / (1 - 0.9 ** step)) / ((v / (1 - 0.95 ** step)).sqrt() + 1e-8)
        torch.testing.assert_close(after, before - rate * (slope + 1e-4 * before), rtol=0, atol=1e-6)
    assert max(line["grad_norm"] for line in lines) > 1    # so it was clipped


def test_the_reference_moves_every_so_many_steps(paced):
    out, _ = paced
    first, second, third = (checkpoint(out, step) for step in (1, 2, 3))
    base = {name: tensor.float() for name, tensor in exported(model.TINY).items()}
    for name in base:
        assert torch.equal(first[f"ref.{name}"], base[name])
        moved = torch.lerp(base[name], second[f"model.{name}"], 1 - 0.996)
        assert torch.equal(second[f"ref.{name}"], moved) and torch.equal(third[f"ref.{name}"], moved)
    assert not torch.equal(second["ref.proj_out.weight"], base["proj_out.weight"])


@pytest.fixture
def alone():
    """This process as the only one of a group."""
    with as_a_process():
        process, _ = train.init_distributed()
        yield process


def zero(x_t, cond, t):
    return torch.zeros_like(x_t)


def identity(x_t, cond, t):
    return x_t


def test_held_out_records_are_looked_at_at_fixed_times_and_noise(cache, alone, monkeypatch):
    """A policy that always says 0 has the error of the videos' own mean square, the reference's is the noise's."""
    monkeypatch.setattr(train, "EVAL_RECORDS", 3)
    records, options = data.Records(cache), train.Options(beta=3.0)
    look = partial(train.evaluate, zero, identity, records, options)
    found = look(alone)
    win, lose = (torch.stack([records[i][name].float() for i in range(3)]) for name in ("win", "lose"))
    for t in ("", *(f"_t{t}" for t in (0.1, 0.3, 0.5, 0.7, 0.9))):
        assert found[f"eval_win{t}"] == pytest.approx(win.square().mean().item(), rel=1e-5)
        assert found[f"eval_lose{t}"] == pytest.approx(lose.square().mean().item(), rel=1e-5)
        differences = [found[f"eval_{name}{t}"] - found[f"eval_ref_{name}{t}"] for name in ("win", "lose")]
        assert found[f"eval_margin{t}"] == pytest.approx(-1.5 * (differences[0] - differences[1]), rel=1e-4, abs=1e-6)
    for t in (0.1, 0.3, 0.5, 0.7, 0.9):                    # x_t − x₀ = t·(ε − x₀)
        assert found[f"eval_ref_win_t{t}"] == pytest.approx(t ** 2 * (1 + win.square().mean().item()), rel=0.05)
    noise, loss_of = [], train.loss_of
    monkeypatch.setattr(train, "loss_of", lambda *given: noise.append(given[2]["noise"]) or loss_of(*given))
    assert look(alone) == found
    assert_unrelated(torch.cat(noise))                     # of each record and t its own
    monkeypatch.setattr(dist, "all_reduce", lambda numbers: None)
    parts = [look(alone._replace(rank=rank, world_size=2)) for rank in (0, 1)]     # which cannot share three evenly
    for name in found:
        assert sum(part[name] for part in parts) == pytest.approx(found[name], rel=1e-6), name


# ---- Training: a run ------------------------------------------------------------------------------------------------

ERRORS = ["win", "lose", "ref_win", "ref_lose"]


def test_a_run_logs_every_step_and_starts_at_log_2(straight):
    lines = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    for line in lines:
        assert {"loss", *ERRORS, "margin", "accuracy", "grad_norm", "lr", "seconds", "tokens_per_second"} <= line.keys()
        by_t = {f"eval_{e}_t{t}" for e in ERRORS for t in train.EVAL_T}
        assert {"eval_margin", "eval_accuracy", *by_t} <= line.keys()
    assert lines[0]["preference"] == pytest.approx(math.log(2), abs=1e-6) and lines[0]["margin"] == 0
    moved = {name: abs(lines[3][f"eval_{name}"] - lines[0][f"eval_{name}"]) for name in ERRORS}
    for name in ("win", "lose"):                           # in the looks, too, it is the policy that learns
        assert moved[f"ref_{name}"] < 0.1 * moved[name]


def test_the_reference_moves_by_ema_in_fp32(straight):
    before = {f"ref.{k}": v.float() for k, v in exported(model.TINY).items()}
    for step in range(1, 5):
        now = checkpoint(straight, step)
        for name in before:
            assert torch.equal(now[name], torch.lerp(before[name], now["model" + name[3:]], 1 - 0.996)), (step, name)
        before = now = {name: now[name] for name in before}
    assert not torch.equal(now["ref.proj_out.weight"], exported(model.TINY)["proj_out.weight"].float())


def test_forwards_of_the_sharded_reference_see_its_updates(cache, tmp_path):
    # after every step, the reference is the policy
    lines = run_training(tmp_path / "run", cache, ema_decay=0.0, steps=3)
    assert [line["margin"] for line in lines] == [0, 0, 0] and lines[0]["win"] != lines[1]["win"]


def test_a_run_exports_what_it_trained(straight):
    ours, last = model.load_dit(straight).net.state_dict(), checkpoint(straight, 4)
    assert {v.dtype for v in exported(straight).values()} == {torch.bfloat16}
    assert all(torch.equal(ours[k[6:]], v.bfloat16().float()) for k, v in last.items() if k.startswith("model."))
    assert not torch.equal(ours["proj_out.weight"], model.load_dit("tiny").net.proj_out.weight)


def test_a_first_loss_that_is_not_log_2_is_a_warning_with_the_figure(capsys):
    line = dict(loss=1.0, lr=1.0, seconds=1.0)
    for step, off, warns in ((0, 1e-4, False), (1, 0.1, False), (0, 0.1, True)):
        train.log_step(io.StringIO(), step, line | {"preference": math.log(2) + off})
        assert ("the first preference loss is 0.793147, not log 2" in capsys.readouterr().out) == warns


def test_a_reference_that_is_not_the_policy_stops_the_run(cache, tmp_path, monkeypatch):
    load_dit, loaded = model.load_dit, []

    def load_another(*arguments):
        loaded.append(load_dit(*arguments))
        with torch.no_grad():
            dict(loaded[-1].net.named_parameters())["proj_out.weight"].mul_(len(loaded))
        return loaded[-1]

    monkeypatch.setattr(model, "load_dit", load_another)
    with pytest.raises(UserError, match="^1 shards of the reference are not the policy"):
        run_training(tmp_path / "run", cache)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_loss_that_is_not_finite_stops_before_the_update(straight, cache, tmp_path, monkeypatch):
    updates, update = [], torch.optim.AdamW.step

    def spy(*arguments, **options):
        updates.append(1)
        return update(*arguments, **options)

    spy_on_losses(monkeypatch, lambda count, loss: loss * (math.nan if count == 3 else 1))
    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    with pytest.raises(UserError) as stopped:
        run_training(tmp_path / "run", cache, save_every=2)
    message = str(stopped.value)
    assert all(part in message for part in ("step 2", *NAMES, "step-000002")) and "\n" not in message
    assert len(updates) == 2 and len(metrics(tmp_path / "run")) == 2
    assert same_tensors(checkpoint(tmp_path / "run", 2), checkpoint(straight, 2))


def test_between_comparisons_the_anchor_trains_alone(cache, tmp_path, monkeypatch):
    compared, supervised = spy_on_losses(monkeypatch), []

    def spy(policy, **given):
        supervised.append(given)
        return realdpo.sft_loss(policy, **given)

    monkeypatch.setattr(train, "sft_loss", spy)
    lines = run_training(tmp_path / "run", cache, compare_every=3, anchor=20.0)
    assert ["ref_win" in line for line in lines] == [True, False, False, True]
    assert [call["scale"] for call in compared] == [3, 3] and len(supervised) == 2
    for line in lines[1:3]:
        assert line["loss"] == pytest.approx(20 * line["win"])
    plain = run_training(tmp_path / "plain", cache, anchor=20.0, steps=1)      # of the same draws
    assert lines[0]["win"] == plain[0]["win"] and lines[0]["preference"] == plain[0]["preference"]
    assert lines[0]["loss"] == pytest.approx(3 * plain[0]["preference"] + 20 * plain[0]["win"])


def test_every_sample_has_its_own_noise_and_t_and_an_epoch_every_record_once(cache, tmp_path, monkeypatch):
    losses = spy_on_losses(monkeypatch)
    monkeypatch.setattr(model.FlowPrediction, "t_min", 0.4)
    run_training(tmp_path / "run", cache, batch=2, t_draw="low")             # four steps: two epochs
    t, noise, wins = (torch.cat([batch[k] for batch in losses]) for k in ("t", "noise", "win"))
    assert len(set(t.tolist())) == 8 and 0.4 < t.min() and t.max() <= 0.6387
    assert_unrelated(noise)
    for epoch in (wins[:4], wins[4:]):
        assert len(epoch.flatten(1).unique(dim=0)) == 4


def test_drawn_negatives_depend_on_seed_step_and_place_alone(cache, tmp_path, monkeypatch):
    losses, runs = spy_on_losses(monkeypatch), []
    for micro_batch in (1, 4):
        run_training(tmp_path / f"run-{micro_batch}", cache, lose_per_step=1, micro_batch=micro_batch, steps=2)
        runs.append([torch.cat([batch[name] for batch in losses]).flatten(1) for name in ("win", "lose")])
        losses.clear()
    for pairs in zip(*runs):
        assert torch.equal(*pairs)
    wins, lose = runs[0]
    assert lose.shape == wins.shape and len(lose) == 8
    assert len(lose.unique(dim=0)) > len(wins.unique(dim=0)) == 4                       # not always the same one


@pytest.mark.parametrize("options", [dict(micro_batch=1), dict(micro_batch=2, graphs="two"),
                                     dict(micro_batch=1, graphs="one"),
                                     dict(checkpointing="full"), dict(checkpointing="selective")], ids=str)
def test_how_a_batch_is_computed_changes_no_gradient(options, straight, cache, tmp_path):
    # Adam's first update divides every gradient by itself, those too that are only rounding.
    lines = run_training(tmp_path / "run", cache, **options, steps=2)
    for ours, theirs, close in zip(lines, metrics(straight), (1e-5, 1e-4)):
        for name in ("loss", "grad_norm", *ERRORS):
            assert ours[name] == pytest.approx(theirs[name], rel=close), name


def test_held_out_records_may_have_fewer_negatives_than_a_step_takes(straight, cache, looks, tmp_path):
    held_out = shutil.copytree(looks["eval_data"], tmp_path / "held-out")
    rewrite_records((held_out / "lose").iterdir(), lambda latents: latents[:1])
    line, = run_training(tmp_path / "run", cache, lose_per_step=2, eval_data=str(held_out), steps=1)
    two = metrics(straight)[0]                             # which has looked at both
    assert line["eval_win"] == pytest.approx(two["eval_win"], rel=1e-3)
    assert abs(line["eval_lose"] / two["eval_lose"] - 1) > 0.01


def test_supervised_training_needs_no_negatives(videos, tmp_path):
    lines = run_training(tmp_path / "run", encode(videos, tmp_path / "cache"), method="sft", steps=2)
    assert lines[0]["loss"] == lines[0]["win"] and not lines[0].keys() & {"lose", "ref_win", "margin"}
    assert not torch.equal(exported(tmp_path / "run")["proj_out.weight"], exported(model.TINY)["proj_out.weight"])


def test_scored_methods_learn_from_generated_videos_by_their_scores(own_cache, tmp_path, monkeypatch):
    records, good, scores = data.Records(own_cache), [], {}
    for i, name in enumerate(records.names):
        best = i % 2                                       # of two negatives each, the even records' first
        scores[name] = [1.0 - best, float(best)]
        good.append(records[i]["lose"][best].float())
    (own_cache / "scores.json").write_text(json.dumps(scores))
    seen = spy_on_losses(monkeypatch)
    lines = run_training(tmp_path / "dpo", own_cache, method="dpo", steps=8)
    assert abs(lines[0]["loss"] - math.log(2)) <= 1e-6 and lines[-1]["loss"] < lines[0]["loss"]
    for call in seen:
        for win in call["win"]:
            assert any(torch.equal(win, each) for each in good)
    lines = run_training(tmp_path / "rwr", own_cache, method="rwr", steps=2)
    assert lines[0].keys() & {"loss", "win", "lose", "margin"} == {"loss", "win"}


# ---- Resuming -------------------------------------------------------------------------------------------------------

def test_two_and_two_steps_are_four_bit_for_bit(half, straight, cache, looks, tmp_path):
    assert run_training(shutil.copytree(half, tmp_path / "run"), cache, **looks) == metrics(straight)
    resume = str(half / "checkpoints" / "step-000002")
    assert len(run_training(tmp_path / "other", cache, resume=resume)) == 2
    assert {name.split(".")[0] for name in checkpoint(straight, 4)} == {"model", "ref", "exp_avg", "exp_avg_sq"}
    for run in ("run", "other"):
        assert same_tensors(checkpoint(tmp_path / run, 4), checkpoint(straight, 4))
        assert same_tensors(exported(tmp_path / run), exported(straight))


def test_a_runs_own_checkpoint_goes_before_the_one_to_start_from(half, straight, alone, tmp_path):
    run, elsewhere = shutil.copytree(half, tmp_path / "run"), str(straight / "checkpoints" / "step-000003")

    def chosen(out, resume=""):
        return train.choose_checkpoint(train.Options(out=str(out), resume=resume), alone)

    assert chosen(run) == chosen(run, elsewhere) == run / "checkpoints" / "step-000002"
    assert chosen(tmp_path / "new", elsewhere) == Path(elsewhere)
    assert chosen(tmp_path / "new") is None


def test_a_run_from_elsewhere_may_take_other_options(half, cache, tmp_path):
    resume = str(half / "checkpoints" / "step-000002")
    line, = run_training(tmp_path / "gentle", cache, resume=resume, lr=1e-5, steps=3)    # after a NaN, say
    assert (line["step"], line["lr"]) == (2, 1e-5)


# What decides a step, and another value of it; all other options decide where, how and how long a run runs.
DECIDES = dict(model="other", method="dpo", beta=7.0, anchor=7.0, weighting="velocity", t_draw="uniform",
               lose_per_step=2, compare_every=7, ema_decay=0.9, ema_every=7, lr=7.0, warmup=7, decay=0.1, batch=16,
               seed=7)


def test_what_decides_a_step_may_not_change_when_a_run_goes_on_and_all_else_may(tmp_path):
    folder, records = tmp_path / "run" / "checkpoints" / "step-000003", data.Records.__new__(data.Records)
    records.folder, records.names, records.hashes = "cache", ["a"], {"a": "1"}
    options = train.Options(model="tiny", out=str(tmp_path / "run"))
    data.write_json(folder / "options.json", {"step": 3, **dataclasses.asdict(options)})
    data.write_json(folder / "records.json", records.hashes)
    assert train.check_checkpoint(folder, options, records) == 3
    for field in dataclasses.fields(options):
        if field.name in DECIDES:
            other = dataclasses.replace(options, **{field.name: DECIDES[field.name]})
            with pytest.raises(UserError, match=re.escape(f"{data.flag(field.name)} ")):
                train.check_checkpoint(folder, other, records)
        elif field.name not in ("out", "steps", "epochs"):
            other = dataclasses.replace(options, **{field.name: "another"})
            assert train.check_checkpoint(folder, other, records) == 3, field.name


def test_the_number_of_steps_may_change_until_the_rate_has_begun_to_fall(cache, tmp_path):
    falling = partial(run_training, tmp_path / "run", cache, decay=0.5, save_every=2)
    falling(steps=2)                                       # rates 1 and 1: of two, none is lower yet
    falling(steps=4)
    assert [line["lr"] for line in metrics(tmp_path / "run")] == pytest.approx([1e-4, 1e-4, 1e-4, 5e-5])
    with pytest.raises(UserError, match=r"step-000004: the rate has begun to fall .* 4 steps.* 8 .*--resume"):
        falling(steps=8)
    resume = str(tmp_path / "run" / "checkpoints" / "step-000004")             # the way that the message names
    lines = run_training(tmp_path / "other", cache, decay=0.5, steps=8, resume=resume)
    assert [line["lr"] for line in lines] == pytest.approx([1e-4, 7.5e-5, 5e-5, 2.5e-5])


def test_a_run_with_comparisons_now_and_then_and_a_falling_rate_goes_on_bit_for_bit(cache, tmp_path):
    run = partial(run_training, cache=cache, compare_every=2, decay=1.0, save_every=1, steps=3)
    straight = run(tmp_path / "straight")
    shutil.copytree(tmp_path / "straight", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000003")            # stopped between two comparisons
    assert run(tmp_path / "run") == straight
    assert same_tensors(checkpoint(tmp_path / "run", 3), checkpoint(tmp_path / "straight", 3))


def test_with_offload_a_run_is_the_same_to_the_bit(straight, cache, looks, tmp_path):
    assert run_training(tmp_path / "run", cache, offload=True, steps=2, **looks) == metrics(straight)[:2]
    assert run_training(tmp_path / "run", cache, **looks) == metrics(straight)           # and may go on without
    assert same_tensors(checkpoint(tmp_path / "run", 4), checkpoint(straight, 4))


def test_a_crash_between_log_and_checkpoint_leaves_no_line_twice(half, straight, cache, looks, tmp_path, monkeypatch):
    def crash(*arguments, **options):
        raise KeyboardInterrupt

    run = shutil.copytree(half, tmp_path / "run")
    monkeypatch.setattr(train.dcp, "save", crash)
    with pytest.raises(KeyboardInterrupt):
        run_training(run, cache, **looks)
    monkeypatch.undo()
    assert (run / "checkpoints" / "step-000003.part").is_dir()
    assert [line["step"] for line in metrics(run)] == [0, 1, 2]                    # one of them without a checkpoint
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "lo')
    assert run_training(run, cache, **looks) == metrics(straight)
    # nor half a checkpoint
    assert {p.name for p in (run / "checkpoints").iterdir()} == {"step-000003", "step-000004"}


def test_the_last_two_checkpoints_stay_and_none_goes_before_the_next_is_whole(cache, tmp_path, monkeypatch):
    remove, folder, there = shutil.rmtree, tmp_path / "run" / "checkpoints", []

    def spy(path, *arguments, **options):
        if re.fullmatch(r"step-\d{6}", Path(path).name):
            there.append(sum((p / "options.json").is_file() for p in folder.glob("step-??????")))
        remove(path, *arguments, **options)

    monkeypatch.setattr(shutil, "rmtree", spy)
    run_training(tmp_path / "run", cache, save_every=1)
    assert {p.name for p in folder.iterdir()} == {"step-000003", "step-000004"} and there == [3, 3]


@pytest.mark.parametrize("steps, options", [(2, {}), (1, dict(max_minutes=1e-9))], ids=["SIGTERM", "--max-minutes"])
def test_a_stopped_run_finishes_its_step_and_saves(steps, options, straight, cache, tmp_path, monkeypatch, capsys):
    def twice_in_the_second(count, loss):                  # Slurm signals every process, and torchrun passes its own on
        for _ in range(2 if count == 2 else 0):
            assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL, "one more SIGTERM would kill the run"
            os.kill(os.getpid(), signal.SIGTERM)
        return loss

    spy_on_losses(monkeypatch, twice_in_the_second)
    assert len(run_training(tmp_path / "run", cache, **options)) == steps               # it returns: exit status 0
    assert "the same command continues" in capsys.readouterr().out and not (tmp_path / "run" / "transformer").exists()
    assert same_tensors(checkpoint(tmp_path / "run", steps), checkpoint(straight, steps))


# ---- Several ranks --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("ranks_a_machine, world, shards", [
    (8, 8, 8), (8, 16, 8), (1, 1, 1), (2, 2, 2), (4, 8, 8), (1, 8, 8), (1, 16, 8), (2, 6, 6), (4, 12, 12), (16, 32, 16),
    (3, 24, 12), (1, 9, 9)])
def test_parameters_are_sharded_over_eight_gpus_or_the_next_number_that_divides(ranks_a_machine, world, shards):
    assert train.shards_of(world, ranks_a_machine) == shards


def test_every_group_waits_for_an_hour():
    """While rank 0 writes an export of 5B; torch's own limit is half of that, with NCCL a sixth."""
    with as_a_process():
        _, mesh = train.init_distributed()
        for group in (dist.group.WORLD, *mesh.get_all_groups()):
            assert group._get_backend(torch.device("cpu")).options._timeout.total_seconds() == 3600


def test_rank_0_chooses_the_checkpoint_to_go_on_from(half, cache, tmp_path, monkeypatch):
    """Here as a rank whose view of the folder is stale: rank 0 says step 1."""
    run, loaded = shutil.copytree(half, tmp_path / "run"), []
    monkeypatch.setattr(dist, "broadcast", lambda step, src: step.fill_(1))
    monkeypatch.setattr(train, "load_checkpoint", lambda state, optimizer, folder, step: loaded.append((folder, step)))
    run_training(run, cache, steps=2)
    assert loaded == [(run / "checkpoints" / "step-000001", 1)]


def watched(function, file):
    """`function`, adding a line of what it makes collectives carry to `file`."""
    def call(*args):
        with Count(carried) as traffic:
            result = function(*args)
        with open(file, "a") as f:
            f.write(json.dumps(+traffic.bytes) + "\n")
        return result
    return call


def one_rank(rank, runs, folder, world_size, ranks_a_machine, dtype, tiny):
    """Some runs, one after the other, as one of several processes."""
    model.TINY = tiny
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank % ranks_a_machine),
                      LOCAL_WORLD_SIZE=str(ranks_a_machine))
    torch.set_num_threads(1)                               # as torchrun does
    train.LEAST_SHARDS = ranks_a_machine                   # two machines of two ranks are to behave like two of eight
    process = data.this_process()._replace(dtype=dtype)
    train.this_process = lambda: process
    for name in "train_step", "ema_update":
        setattr(train, name, watched(getattr(train, name), folder / f"{name}-{rank}"))
    join = dist.init_process_group
    for i, options in enumerate(runs):
        dist.init_process_group = partial(join, init_method=f"file://{folder}/store-{i}", rank=rank,
                                          world_size=world_size)
        if rank > 0:
            options = options | options.get("others", {})  # what ranks other than 0 are told
        try:
            run_training(**{name: value for name, value in options.items() if name != "others"})
        except UserError as e:
            (folder / f"error-{i}-{rank}").write_text(str(e))


def run_on_ranks(runs, folder, world_size=2, ranks_a_machine=2, dtype=torch.float32):
    """Train on several ranks. Returns what each step of rank 0 made collectives carry, {"train_step": [...], ...}."""
    mp.start_processes(one_rank, nprocs=world_size, args=(runs, folder, world_size, ranks_a_machine, dtype, model.TINY),
                       start_method=processes.get_start_method())
    traffic = {}
    for name in ("train_step", "ema_update"):
        traffic[name] = [json.loads(line) for line in (folder / f"{name}-0").read_text().splitlines()]
    return traffic


def same_to_rounding(out, lines, straight):
    """Whether a run's log and weights are those of the undisturbed run but for the order of sums."""
    for ours, theirs in zip(lines, metrics(straight), strict=True):
        assert ours["preference"] == pytest.approx(theirs["preference"], abs=1e-6, rel=3e-6)
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=0, rel=1e-6)          # the anchor is added, times 1000
        assert ours == pytest.approx({k: theirs[k] for k in ours}, abs=1e-6, rel=1e-5), out
    for name, ours in exported(out).items():
        torch.testing.assert_close(ours, exported(straight)[name], rtol=2 ** -7, atol=1e-5)      # 2⁻⁷: bf16's last bit


def test_two_ranks_take_the_steps_of_one_and_stop_when_either_is_asked_to(half, straight, cache, looks, tmp_path):
    runs = [dict(out=tmp_path / "two", cache=cache, steps=2, **looks),
            dict(out=tmp_path / "stopped", cache=cache, others=dict(max_minutes=1e-9))]
    run_on_ranks(runs, tmp_path)
    same_to_rounding(tmp_path / "two", metrics(tmp_path / "two"), half)
    assert [line.keys() for line in metrics(tmp_path / "two")] == [line.keys() for line in metrics(half)]
    same_to_rounding(tmp_path / "two", run_training(tmp_path / "two", cache, **looks), straight)     # on one rank now
    assert len(metrics(tmp_path / "stopped")) == 1
    assert (tmp_path / "stopped" / "checkpoints" / "step-000001" / "options.json").is_file()


@pytest.mark.slow
def test_two_ranks_compute_what_one_does_and_may_alternate_with_it(half, straight, cache, looks, tmp_path):
    shutil.copytree(half, tmp_path / "hop")
    runs = [dict(out=tmp_path / "two", cache=cache, **looks), dict(out=tmp_path / "hop", cache=cache, steps=3),
            dict(out=tmp_path / "odd", cache=cache, batch=3)]
    traffic = run_on_ranks(runs, tmp_path)
    same_to_rounding(tmp_path / "two", metrics(tmp_path / "two"), straight)
    same_to_rounding(tmp_path / "hop", run_training(tmp_path / "hop", cache, **looks), straight)
    assert [line.keys() for line in metrics(tmp_path / "two")] == [line.keys() for line in metrics(straight)]
    assert all("--batch 3" in (tmp_path / f"error-2-{rank}").read_text() for rank in range(2))
    weights = 4 * sum(p.numel() for p in model.load_dit("tiny").parameters())            # fp32 on a CPU
    # gathered: policy forward and backward, reference; reduced: half is a rank's own
    for step in traffic["train_step"]:
        assert step["allreduce_ default_pg"] < 100
        assert step["_allgather_base_ default_pg"] == 3 * weights
        assert step["_reduce_scatter_base_ default_pg"] == weights / 2
    assert len(traffic["ema_update"]) == len(traffic["train_step"]) and not any(traffic["ema_update"])
    next((tmp_path / "two" / "checkpoints" / "step-000004").glob("shard-00001-*")).unlink()  # a copy that was cut off
    lacks = r"tensor \S+ has \d+ numbers, expected \d+.*delete .*step-000004 to continue from an earlier"
    with pytest.raises(UserError, match=lacks):
        run_training(tmp_path / "two", cache, steps=5)


@pytest.mark.slow
def test_two_ranks_agree_when_to_compare(cache, tmp_path):
    straight = run_training(tmp_path / "one", cache, compare_every=2)
    traffic = run_on_ranks([dict(out=tmp_path / "two", cache=cache, compare_every=2)], tmp_path)
    for ours, theirs in zip(metrics(tmp_path / "two"), straight, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-6, rel=1e-5)
    gathered = [step["_allgather_base_ default_pg"] for step in traffic["train_step"]]
    assert gathered[0] == gathered[2] == 1.5 * gathered[1] == 1.5 * gathered[3]          # between: no reference


@pytest.mark.slow
def test_two_machines_of_two_ranks_compute_what_one_rank_does(half, straight, cache, tmp_path):
    shutil.copytree(half, tmp_path / "from-one")
    runs = [dict(out=tmp_path / "four", cache=cache, save_every=2), dict(out=tmp_path / "from-one", cache=cache),
            dict(out=tmp_path / "often", cache=cache, batch=8, micro_batch=1, graphs="two", steps=1),
            dict(out=tmp_path / "offload", cache=cache, offload=True, graphs="one", micro_batch=1)]
    traffic = run_on_ranks(runs, tmp_path, world_size=4)
    for name in ("four", "from-one", "offload"):
        same_to_rounding(tmp_path / name, metrics(tmp_path / name), straight)
    shutil.rmtree(tmp_path / "four" / "checkpoints" / "step-000004")
    same_to_rounding(tmp_path / "four", run_training(tmp_path / "four", cache), straight)     # the rest on one rank
    weights = 4 * sum(p.numel() for p in model.load_dit("tiny").parameters())
    *steps, often = traffic["train_step"][:7]
    for step in steps:                                     # between machines: each rank's half of the gradient
        assert step.pop("allreduce_ default_pg") < 100     # the metrics
        assert step == {"_allgather_base_ mesh_shard": 3 * weights, "_reduce_scatter_base_ mesh_shard": weights / 2,
                        "allreduce_ mesh_replicate": weights / 2}
    assert often["_reduce_scatter_base_ mesh_shard"] == 2 * 2 * weights / 2    # of two samples' two videos each,
    assert often["allreduce_ mesh_replicate"] == weights / 2                   # but across machines once a step
    assert not any(traffic["ema_update"])


@pytest.mark.slow
def test_the_default_of_a_run_on_gpus(cache, tmp_path):
    """Two ranks that compute in bf16, keep two graphs, take a sample at a time and checkpoint selectively."""
    default = dict(cache=cache, batch=2, graphs="two", checkpointing="selective", micro_batch=1, lose_per_step=1)
    runs = {"straight": {}, "halves": dict(steps=2), "halves again": {}, "full": dict(checkpointing="full", steps=1),
            "whole": dict(graphs="all", steps=1), "ema": dict(ema_decay=0.0, steps=2),
            "anchor": dict(anchor=2.0, batch=4, lose_per_step=0, steps=1),
            "anchor, whole": dict(anchor=2.0, batch=4, lose_per_step=0, steps=1, graphs="all")}
    every = [default | options | dict(out=tmp_path / name.removesuffix(" again")) for name, options in runs.items()]
    run_on_ranks(every, tmp_path, dtype=torch.bfloat16)
    lines = {name: metrics(tmp_path / name) for name in runs if name != "halves again"}
    for name, (first, *_) in lines.items():
        assert first["preference"] == torch.tensor(2.0).log() and first["margin"] == 0, name
    for line in lines["ema"]:                              # the reference, root parameters too, is the policy again
        assert line["margin"] == 0 and line["win"] == line["ref_win"]
    assert lines["ema"][0]["ref_win"] != lines["ema"][1]["ref_win"]
    assert lines["full"] == lines["straight"][:1]
    for name, streamed in (("whole", lines["straight"][0]), ("anchor, whole", lines["anchor"][0])):
        whole = lines[name][0]
        assert streamed["loss"] == pytest.approx(whole["loss"], rel=1e-3)
        assert streamed["grad_norm"] == pytest.approx(whole["grad_norm"], rel=0.02)     # bf16: up to 1.5 % was seen
    assert lines["halves"] == lines["straight"]
    assert same_tensors(exported(tmp_path / "halves"), exported(tmp_path / "straight"))
