"""Attention: how often it runs with each way of checkpointing, and its gradients by cuDNN and by FlashAttention.

torch prefers cuDNN's on Hopper. A public report has NaN in its backward pass at some lengths (64 modulo 128), which 17
frames of 480×720 have (6,976 tokens); 49 frames have 17,776.
"""
import re
from functools import partial
from itertools import product

from common import agree, c, clock, condition, cuda, denoiser, device, free, head_dim, heads, randn, row, shape
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
import torch.nn.functional as nnf

x, cond, t = randn(1, *shape), condition(), torch.full((1,), 0.5, device=device)
for compiled, (how, runs) in product((False, True), (("selective", 2), (True, 4))):
    net = denoiser(2, compiled)
    net.checkpointing = how
    net(x, cond, t).mean().backward()                      # compiles
    with torch.profiler.profile() as profile:
        net(x, cond, t).mean().backward()
        torch.cuda.synchronize() if cuda else None
    kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    attention = [name for name in kernels if re.search("flash|fmha|sdpa|attention", name, re.I)]
    forward = [name for name in attention if not re.search("^triton|bwd|bprop|cutlassB|backward", name, re.I)]
    row(f"attention's forward, {'compiled' if compiled else 'eager'}, checkpointing {how}: runs", len(forward), runs)
    assert len(forward) == runs or not cuda, forward       # a CPU has no kernels to count
    free()

def attend(qkv, backend):
    """The output of attention and the gradients of q, k and v."""
    with sdpa_kernel(backend):
        out = nnf.scaled_dot_product_attention(*qkv)
    return out.detach(), *torch.autograd.grad(out.square().sum(), qkv)

for length in c["lengths"]:
    qkv = [randn(1, heads, length, head_dim).roll(i, dims=-2).requires_grad_() for i in range(3)]
    flash, _, expected = clock(partial(attend, qkv, SDPBackend.FLASH_ATTENTION))
    cudnn, _, result = clock(partial(attend, qkv, SDPBackend.CUDNN_ATTENTION if cuda else SDPBackend.MATH))
    row(f"attention, forward + backward, {length:,} tokens: cuDNN : flash", cudnn, flash)
    agree(result, expected, 0.05)
    free()
