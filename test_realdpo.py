"""What a reader of the method wants to see proved: the method against formulas and a naive Appendix C, the networks
against the libraries that they reimplement, the sampler against the published one. tests/ holds all else, by subject.

    pytest                             in a minute and a half on two cores; needs diffusers and transformers for the
                                       oracles
    pytest -m slow                     several processes, compiled blocks, the experiment
    CHAOS=20 pytest -m chaos -s        kills every stage at random instants
    pytest -m gpu -s                   what only a GPU can show: a table, within ten minutes

All other tests run on the CPU, also where there is a GPU.
"""
import copy, math, shutil
from functools import partial

from tests.helpers import (CONFIG, Count, DIT, FULL_DIT, FULL_T5, FULL_VAE, PROMPTS, SCHEDULER, T5, Toy, VAE, Watched, carried,
                           distances, inputs, preference, public, randn, relative, rewrite, scramble)

import huggingface_hub
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

import model
import realdpo
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
    loss, metrics = loss_by(graphs)(denoiser, copy.deepcopy(denoiser), **preference(2, 3), beta=5000.0)
    assert loss.item() == torch.tensor(2.0).log().item()
    assert metrics["margin"] == metrics["accuracy"] == 0 and metrics["win"] == metrics["ref_win"] > 0

@pytest.mark.parametrize("graphs, alive, policy_calls, reference_calls", [
    ("all", 1, [4], [4]), ("two", 2, [1, 1, 1, 1], [1, 1, 1, 1]), ("one", 1, [1, 1, 1, 1, 1], [1, 1, 1, 1])])
def test_so_many_graphs_are_alive_at_a_time(graphs, alive, policy_calls, reference_calls):
    """Of a win and three negatives: all four in one batch, or two, or one for one more forward pass."""
    policy, reference = Watched(), Watched()
    loss, _ = loss_by(graphs)(policy, reference, **preference(1, 3), beta=1.0)
    loss.backward()
    assert (policy.most, policy.calls) == (alive, policy_calls)
    assert (reference.most, reference.calls) == (0, reference_calls)

def test_velocity_weighting_is_the_squared_error_of_the_velocity():
    policy, (win, cond), t, noise = Toy(1), inputs(3), torch.tensor([0.02, 0.5, 1.0]), randn(3, 4, 5, 4, 6, seed=3)
    x_t = realdpo.add_noise(win, noise, t)
    velocity = (x_t - policy(x_t, cond, t)) / t[:, None, None, None, None]
    loss, metrics = realdpo.sft_loss(policy, win=win, cond=cond, t=t, noise=noise, weighting="velocity")
    torch.testing.assert_close(loss, (velocity - (noise - win)).square().mean(), rtol=1e-5, atol=0)
    assert metrics["win"] == loss and not metrics["win"].requires_grad

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
    alpha, sigma, s = (c[:, None, None, None, None] for c in (alpha, sigma, ((1 - t) ** 2 + t ** 2).sqrt()))
    z = (x_t / s).float()
    with torch.no_grad():
        assert relative(denoiser(x_t, cond, t), alpha * z - sigma * oracle_output(net, z, cond, k)) <= 2e-5

def test_flow_denoiser_subtracts_the_velocity_diffusers_predicts(make_oracle, tmp_path):
    net, _, _ = make_oracle()
    rewrite(tmp_path / "scheduler" / "scheduler_config.json", _class_name="FlowMatchEulerDiscreteScheduler")
    (x_t, cond), t = inputs(2), torch.tensor([0.25, 1.0])
    expected = x_t - t[:, None, None, None, None] * oracle_output(net, x_t, cond, 1000 * t)
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
        asked.append(arguments[-2])
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
        return self.predict(x_t, t[:, None, None, None, None])

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
    x = realdpo.sample(denoiser, noise, cond, steps=1, guidance=4.0, uncond=other.text, progress=False)
    torch.testing.assert_close(x, without + 4 * (with_caption - without))
