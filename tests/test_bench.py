"""Time and memory against the libraries: pytest -m bench -s (BENCH=5 rounds)"""
import os, subprocess, sys
from functools import partial

from tests import USERS_THREADS
from tests.helpers import (Count, DIT, REPO, SCHEDULER, SHIPPED, T5, VAE, distances, inputs, randn, relative,
                           save_networks, touched)

from support.films import from_uint8
import numpy as np
import pytest
import torch
from torch.nn.utils import parameters_to_vector
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import model
from realdpo import Condition
from toy import make_model, world

pytest_plugins = "tests.helpers"

@pytest.mark.bench
def test_compiled_blocks_sample_and_train_like_eager_ones(denoiser, folder):
    """With the real compiler, which takes its time."""
    compiled, results = model.load_dit(folder), []
    compiled.net.compile_blocks()
    compiled.checkpointing = "selective"
    for net in compiled, denoiser:
        out = net(*inputs(2), torch.tensor([0.3, 0.9]))
        out.square().mean().backward()
        gradients = parameters_to_vector(p.grad for p in net.parameters())
        results.append((out.detach(), net(*inputs(1), torch.tensor([0.5])).detach(), gradients))
    for ours, theirs in zip(*results):
        assert relative(ours, theirs) <= 2e-5

WIDE_DIT = DIT | dict(num_attention_heads=8, attention_head_dim=64, num_layers=6, in_channels=32, out_channels=16,
                      time_embed_dim=512, text_embed_dim=256, max_text_seq_length=226,
                      use_learned_positional_embeddings=False)
QUARTER_VAE = VAE | dict(block_out_channels=[32, 64, 64, 128], layers_per_block=3, latent_channels=16,
                         norm_num_groups=32, down_block_types=["CogVideoXDownBlock3D"] * 4,
                         up_block_types=["CogVideoXUpBlock3D"] * 4)
DEEP_T5 = T5 | dict(model_type="t5", vocab_size=1000, d_model=256, d_kv=64, d_ff=640, num_layers=24, num_heads=4)
RACES = [                                                  # of race.py: sizes, most time and memory as a part of theirs
    ("DiT forward", (1, 5, 32, 40), 1.00, 1.0),
    ("DiT forward", (2, 3, 16, 24), 1.00, 1.02),           # two short clips
    ("DiT forward and backward", (1, 5, 32, 40), 1.00, 1.0),
    ("RealDPO step", (1, 5, 32, 40), 0.66, 1.0),
    ("RealDPO step, one negative of three", (1, 5, 32, 40), 0.32, 1.0),
    ("RealDPO step, one negative, one graph", (1, 5, 32, 40), 0.37, 1.0),
    ("VAE encode", (17, 240, 360), 0.95, 0.72),
    ("VAE decode", (17, 240, 360), 0.70, 0.70),
    ("VAE encode", (49, 240, 360), 0.95, 0.70),
    ("VAE decode", (49, 240, 360), 0.70, 0.70),
    ("T5", (), 1.10, 1.0),
]

@pytest.mark.bench
@pytest.mark.parametrize("which", ["tiny", "random, 5B's schedule"])
def test_25_steps_of_the_multistep_solver_against_50_of_euler(which):
    clips = [world.toy_video(3, i) for i in range(4)]
    video = torch.stack([from_uint8(frames) for frames, _ in clips])
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
    tokens, width, costs, tensor = 17_776, 3072, [], partial(torch.empty, requires_grad=True)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with FakeTensorMode():
            text, video, time = tensor(1, 226, width), tensor(1, tokens - 226, width), tensor(1, 512)
            ours = partial(model.Block(width, 48, 512, 1e-5), text, video, time, torch.empty(tokens, 1, 32, 2).float())
            rope = (torch.empty(tokens - 226, 64).float(),) * 2
            theirs = partial(CogVideoXBlock(width, 48, 64, 512, attention_bias=True), video, text, time, rope)
            for block in (ours, theirs):
                with torch.set_grad_enabled(backward), Count(touched) as count, FlopCounterMode(display=False) as flops:
                    out = block()
                    sum(x.sum() for x in out).backward() if backward else None
                costs += [flops.get_total_flops() / 1e12, sum(count.bytes.values()) / 1e9]
    finally:
        torch.set_default_dtype(torch.float32)
    flop, moved, their_flop, their_moved = costs
    print(f"\n5B block, {'forward and backward' if backward else 'forward'}: {flop:.2f} : {their_flop:.2f} TFLOP of "
          f"matrix products, {moved:.1f} : {their_moved:.1f} GB = {moved / their_moved:.2f}")
    assert flop == pytest.approx(their_flop, rel=0.001) and moved <= their_moved

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

    rounds = [(run("theirs"), run("ours")) for _ in range(int(os.environ.get("BENCH", 5)))]
    rounds = np.array(rounds)                              # (rounds, side, measure)
    theirs, ours = np.median(rounds, axis=0)
    return theirs, ours, np.median(rounds[:, 1] / rounds[:, 0], axis=0)

@pytest.mark.bench
@pytest.mark.parametrize("name, sizes, most_time, most_memory", RACES)
def test_time_and_memory_against_the_libraries(name, sizes, most_time, most_memory, wide):
    pytest.importorskip("transformers" if name == "T5" else "diffusers")
    theirs, ours, (time_ratio, memory_ratio) = race(wide, name, sizes)
    print(f"\n{f'{name} {sizes}':55} {ours[0]:6.2f} s : {theirs[0]:6.2f} s = {time_ratio:.2f}   "
          f"{ours[1]:5.0f} : {theirs[1]:5.0f} MiB = {memory_ratio:.2f}")
    assert time_ratio <= most_time and memory_ratio <= most_memory
