"""Time and memory against the libraries: pytest -m bench -s (BENCH=5 rounds)"""
import os, subprocess, sys
from functools import partial

from tests import USERS_THREADS
from tests.helpers import (Count, DIT, REPO, SCHEDULER, SHIPPED, T5, VAE, distances, inputs, randn, relative,
                           save_networks, touched)

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
RACES = {                                                  # of race.py: sizes, most time and memory as a part of theirs
    "DiT forward": ("DiT forward", (1, 5, 32, 40), 1.00, 1.0),
    "DiT forward, two short clips": ("DiT forward", (2, 3, 16, 24), 1.00, 1.02),
    "DiT forward and backward": ("DiT forward and backward", (1, 5, 32, 40), 1.00, 1.0),
    "RealDPO step": ("RealDPO step", (1, 5, 32, 40), 0.66, 1.0),
    "RealDPO step, one negative of three": ("RealDPO step, one negative of three", (1, 5, 32, 40), 0.32, 1.0),
    "RealDPO step, one negative, one graph": ("RealDPO step, one negative, one graph", (1, 5, 32, 40), 0.37, 1.0),
    "VAE encode": ("VAE encode", (17, 240, 360), 0.95, 0.72),
    "VAE decode": ("VAE decode", (17, 240, 360), 0.70, 0.70),
    "VAE encode, 49 frames": ("VAE encode", (49, 240, 360), 0.95, 0.70),
    "VAE decode, 49 frames": ("VAE decode", (49, 240, 360), 0.70, 0.70),
    "T5": ("T5", (), 1.10, 1.0),
}


@pytest.mark.bench
@pytest.mark.parametrize("which", ["tiny", "random, 5B's schedule"])
def test_25_steps_of_the_multistep_solver_against_50_of_euler(which):
    clips = [world.toy_video(3, i) for i in range(4)]
    video = torch.stack([data.from_uint8(frames) for frames, _ in clips])
    cond = Condition(model.load_text_encoder("tiny")([caption for _, caption in clips]),
                     model.load_vae("tiny").encode(video[:, :, :1]))
    torch.manual_seed(0)
    denoiser = (model.load_dit(SHIPPED) if which == "tiny"
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


def race(folder, name, sizes):
    """Medians over BENCH rounds, sides alternating: their (seconds, MiB), ours, and the two ratios ours / theirs."""
    environment = {**os.environ, "OMP_NUM_THREADS": USERS_THREADS or str(os.cpu_count()), "PYTHONPATH": str(REPO)}

    def run(side):
        command = [sys.executable, "-W", "ignore", REPO / "tests" / "race.py", name, side, folder, *map(str, sizes)]
        done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return [float(x) for x in done.stdout.split()[-2:]]

    rounds = []
    for _ in range(int(os.environ.get("BENCH", 5))):
        rounds.append((run("theirs"), run("ours")))
    rounds = np.array(rounds)                              # (rounds, side, measure)
    theirs, ours = np.median(rounds, axis=0)
    return theirs, ours, np.median(rounds[:, 1] / rounds[:, 0], axis=0)


@pytest.mark.bench
@pytest.mark.parametrize("what", RACES)
def test_time_and_memory_against_the_libraries(what, wide):
    name, sizes, most_time, most_memory = RACES[what]
    pytest.importorskip("transformers" if name == "T5" else "diffusers")
    theirs, ours, (time_ratio, memory_ratio) = race(wide, name, sizes)
    print(f"\n{what:38} {ours[0]:6.2f} s : {theirs[0]:6.2f} s = {time_ratio:.2f}   "
          f"{ours[1]:5.0f} : {theirs[1]:5.0f} MiB = {memory_ratio:.2f}")
    assert time_ratio <= most_time and memory_ratio <= most_memory
