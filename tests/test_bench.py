"""Time and memory against the libraries: pytest -m bench -s (BENCH=5 rounds)"""
import os, subprocess, sys
from functools import partial

from tests import USERS_THREADS
from tests.helpers import (Count, DIT, REPO, SCHEDULER, T5, VAE, distances, inputs, randn, relative, save_networks,
                           touched)

import numpy as np
import pytest
import torch
from torch.nn.utils import parameters_to_vector
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import data
import model
from realdpo import Condition
from toy import make_model, world

pytest_plugins = "tests.helpers"


@pytest.mark.bench
def test_compiled_blocks_sample_and_train_like_eager_ones(denoiser, folder):
    """With the real compiler, which takes its time."""
    compiled = model.load_dit(folder)
    compiled.net.compile_blocks()
    compiled.checkpointing = "selective"
    results = []
    for net in denoiser, compiled:
        out = net(*inputs(2), torch.tensor([0.3, 0.9]))
        out.square().mean().backward()
        with torch.no_grad():
            results.append((out.detach(), net(*inputs(1), torch.tensor([0.5])),
                            parameters_to_vector(p.grad for p in net.parameters())))
    for ours, theirs in zip(*reversed(results)):
        assert relative(ours, theirs) <= 2e-5


WIDE_DIT = DIT | dict(num_attention_heads=8, attention_head_dim=64, num_layers=6, in_channels=32, out_channels=16,
                      time_embed_dim=512, text_embed_dim=256, max_text_seq_length=226,
                      use_learned_positional_embeddings=False)
QUARTER_VAE = VAE | dict(block_out_channels=[32, 64, 64, 128], layers_per_block=3, latent_channels=16,
                         norm_num_groups=32, down_block_types=["CogVideoXDownBlock3D"] * 4,
                         up_block_types=["CogVideoXUpBlock3D"] * 4)
DEEP_T5 = T5 | dict(model_type="t5", vocab_size=1000, d_model=256, d_kv=64, d_ff=640, num_layers=24, num_heads=4)
# Each side runs in a process of its own: what it imports and prepares, then `work`, of which the second call is timed.
CLOCK = """
import sys, time, torch
folder, *numbers = sys.argv[1:]; numbers = [int(n) for n in numbers]
torch.manual_seed(0)
{side}
work(); begin = time.time(); work()
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(time.time() - begin, peak / 1024)
"""
THEIR_DIT = """
import copy, diffusers, torch.nn.functional as nnf
from diffusers.models.embeddings import get_3d_rotary_pos_embed
net = diffusers.CogVideoXTransformer3DModel.from_pretrained(folder + "/transformer")
b, f, h, w = numbers
x, text, k = torch.randn(b, f, 32, h, w), torch.randn(b, 226, 256), torch.full((b,), 500)
rope = get_3d_rotary_pos_embed(64, ((0, 0), (h // 2, w // 2)), (h // 2, w // 2), f)
forward = lambda net, x: net(x, text, k, image_rotary_emb=rope, return_dict=False)[0]
"""
OUR_DIT = """
import model
from realdpo import Condition, realdpo_loss
net = model.load_dit(folder)
b, f, h, w = numbers
cond, t = Condition(torch.randn(b, 226, 256), torch.randn(b, 16, 1, h, w)), torch.full((b,), 0.5)
x = torch.randn(b, 16, f, h, w)
"""
THEIR_VAE = ("import diffusers; vae = diffusers.AutoencoderKLCogVideoX.from_pretrained(folder + '/vae').eval(); "
             "f, h, w = numbers\n")
OUR_VAE = "import model; vae = model.load_vae(folder); f, h, w = numbers\n"
VIDEO, LATENTS = "x = torch.rand(1, 3, f, h, w) * 2 - 1\n", "x = torch.randn(1, 16, (f - 1) // 4 + 1, h // 8, w // 8)\n"
NO_GRAD = "work = torch.no_grad()(lambda: {})"
FORWARD = THEIR_DIT + NO_GRAD.format("forward(net, x)"), OUR_DIT + NO_GRAD.format("net(x, cond, t)")
ENCODE = THEIR_VAE + VIDEO + NO_GRAD.format("vae.encode(x)"), OUR_VAE + VIDEO + "work = lambda: vae.encode(x)"
DECODE = THEIR_VAE + LATENTS + NO_GRAD.format("vae.decode(x)"), OUR_VAE + LATENTS + "work = lambda: vae.decode(x)"
T5_IDS = "ids = torch.randint(3, 1000, (8, 226))\n"
# The authors' algorithm: each negative with two policy and two reference forwards and a backward pass of its own.
THEIR_STEP = THEIR_DIT + """
ref = copy.deepcopy(net).requires_grad_(False); net.train().enable_gradient_checkpointing()
def error(net, x): return (forward(net, x) - x[:, :, :16]).square().mean()
def work():
    for _ in range(3):
        difference = error(net, x) - error(net, x + 1)
        with torch.no_grad(): reference = error(ref, x) - error(ref, x + 1)
        (-nnf.logsigmoid(-2500 * (difference - reference)) / 3).backward()
"""
OUR_STEP = OUR_DIT + """
ref = model.load_dit(folder).requires_grad_(False); net.checkpointing = "selective"
lose = torch.randn(b, {n}, 16, f, h, w)
work = lambda: realdpo_loss(net, ref, win=x, lose=lose, cond=cond, beta=5000, stream=True)
"""
RACES = {                                              # theirs, ours, sizes, most time and memory as a part of theirs
    "DiT forward": (*FORWARD, (1, 5, 32, 40), 1.00, 1.0),
    "DiT forward, two short clips": (*FORWARD, (2, 3, 16, 24), 1.00, 1.02),
    "DiT forward and backward": (THEIR_DIT + "work = lambda: forward(net, x).sum().backward()",
                                 OUR_DIT + "work = lambda: net(x, cond, t).sum().backward()",
                                 (1, 5, 32, 40), 1.00, 1.0),
    "RealDPO step": (THEIR_STEP, OUR_STEP.format(n=3), (1, 5, 32, 40), 0.66, 1.0),
    "RealDPO step, one negative of three": (THEIR_STEP, OUR_STEP.format(n=1), (1, 5, 32, 40), 0.32, 1.0),
    "VAE encode": (*ENCODE, (17, 240, 360), 0.95, 0.72),
    "VAE decode": (*DECODE, (17, 240, 360), 0.70, 0.70),
    "VAE encode, 49 frames": (*ENCODE, (49, 240, 360), 0.95, 0.70),
    "VAE decode, 49 frames": (*DECODE, (49, 240, 360), 0.70, 0.70),
    "T5": ("import transformers; net = transformers.T5EncoderModel.from_pretrained(folder + '/text_encoder').eval()\n"
           + T5_IDS + NO_GRAD.format("net(ids)"), "import model; from pathlib import Path\n" + T5_IDS + """
config = model.read_config(Path(folder), "text_encoder", "T5EncoderModel")
net = model.read_weights(model.empty(model.T5Encoder, config, torch.float32, "cpu"), Path(folder, "text_encoder"))
""" + NO_GRAD.format("net(ids)"), (), 1.10, 1.0),
}


@pytest.mark.bench
@pytest.mark.parametrize("which", ["tiny", "random, 5B's schedule"])
def test_25_steps_of_the_multistep_solver_against_50_of_euler(which):
    clips = [world.toy_video(3, i) for i in range(4)]
    video = torch.stack([data.from_uint8(frames) for frames, _ in clips])
    cond = Condition(model.load_text_encoder("tiny")([caption for _, caption in clips]),
                     model.load_vae("tiny").encode(video[:, :, :1]))
    torch.manual_seed(0)
    denoiser = (model.load_dit("tiny") if which == "tiny"
                else model.Denoiser(model.DiT(make_model.TINY_DIT), model.VPrediction(SCHEDULER), None))
    multistep, euler = distances(denoiser, randn(4, 8, 5, 8, 8), cond)
    print(f"\n{which}: multistep, 25 evaluations: {multistep:.4f}; Euler, 50: {euler:.4f}")
    assert multistep <= euler


@pytest.mark.bench
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward and backward"])
def test_what_a_5b_block_reads_and_writes(diffusers, backward):
    """One sequence at 49×480×720 in bf16, kernel by kernel, on tensors without data: the same FLOP, fewer bytes."""
    from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock
    tokens, text, width = 17_776, 226, 3072

    def theirs():
        block = CogVideoXBlock(dim=width, num_attention_heads=48, attention_head_dim=64, time_embed_dim=512,
                               attention_bias=True)
        return block, (tensor(1, tokens - text, width), tensor(1, text, width), tensor(1, 512),
                       (torch.empty(tokens - text, 64, dtype=torch.float32),) * 2)

    def ours():
        return model.Block(width, 48, 512, 1e-5), (tensor(1, text, width), tensor(1, tokens - text, width),
                                                   tensor(1, 512), torch.empty(tokens, 1, 32, 2, dtype=torch.float32))

    def cost(make):
        with FakeTensorMode():
            block, inputs = make()
            with torch.set_grad_enabled(backward), Count(touched) as count, FlopCounterMode(display=False) as flops:
                out = block(*inputs)
                sum(x.sum() for x in tree_leaves(out)).backward() if backward else None
        return flops.get_total_flops() / 1e12, sum(count.bytes.values()) / 1e9

    tensor = partial(torch.empty, requires_grad=True)
    torch.set_default_dtype(torch.bfloat16)
    try:
        (flops, ours), (expected, theirs) = cost(ours), cost(theirs)
    finally:
        torch.set_default_dtype(torch.float32)
    print(f"\n5B block, {'forward and backward' if backward else 'forward'}: {flops:.2f} : {expected:.2f} TFLOP of "
          f"matrix products, {ours:.1f} : {theirs:.1f} GB = {ours / theirs:.2f}")
    assert flops == pytest.approx(expected, rel=0.001) and ours <= theirs


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    return save_networks(tmp_path_factory.mktemp("wide"), WIDE_DIT, QUARTER_VAE, DEEP_T5)


def race(folder, theirs, ours, sizes):
    """Medians over BENCH rounds, sides alternating: their (seconds, MiB), ours, and the two ratios ours / theirs."""
    def run(side):
        environment = {**os.environ, "OMP_NUM_THREADS": USERS_THREADS or str(os.cpu_count())}
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", CLOCK.format(side=side), folder, *map(str, sizes)],
                              cwd=REPO, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return [float(x) for x in done.stdout.split()[-2:]]

    # (rounds, side, measure)
    rounds = np.array([(run(theirs), run(ours)) for _ in range(int(os.environ.get("BENCH", 5)))])
    return *np.median(rounds, axis=0), np.median(rounds[:, 1] / rounds[:, 0], axis=0)


@pytest.mark.bench
@pytest.mark.parametrize("name", RACES)
def test_time_and_memory_against_the_libraries(name, wide):
    pytest.importorskip("transformers" if name == "T5" else "diffusers")
    *sides, sizes, most_time, most_memory = RACES[name]
    theirs, ours, (time_ratio, memory_ratio) = race(wide, *sides, sizes)
    print(f"\n{name:30} {ours[0]:6.2f} s : {theirs[0]:6.2f} s = {time_ratio:.2f}   "
          f"{ours[1]:5.0f} : {theirs[1]:5.0f} MiB = {memory_ratio:.2f}")
    assert time_ratio <= most_time and memory_ratio <= most_memory
