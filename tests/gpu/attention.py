"""Attention: how often it runs with each way of checkpointing, and its gradients by cuDNN and by FlashAttention.

torch prefers cuDNN's on Hopper. A public report has NaN in its backward pass at some lengths (64 modulo 128), which 17
frames of 480×720 have (6,976 tokens); 49 frames have 17,776.
"""
import re
from collections import Counter

from common import c, clock, condition, cuda, denoiser, device, free, head_dim, heads, randn, relative, row, shape
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
import torch.nn.functional as nnf

activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * cuda
layers, x, cond, t = 2, randn(1, *shape), condition(), torch.full((1,), 0.5, device=device)
for compiled in (False, True):
    for how, runs in (("selective", layers), (True, 2 * layers)):
        net = denoiser(layers)
        if compiled:
            net.net.compile_blocks()
        net.checkpointing = how
        net(x, cond, t).mean().backward()                  # compiles
        with torch.profiler.profile(activities=activities) as profile:
            net(x, cond, t).mean().backward()
            if cuda:
                torch.cuda.synchronize()
        kernels = Counter()
        for event in profile.events():
            on_gpu = event.device_type == torch.autograd.DeviceType.CUDA and not event.name.startswith("triton")
            if on_gpu and re.search("flash|fmha|sdpa|attention", event.name, re.I):
                kernels[event.name] += 1
        forward = sum(count for name, count in kernels.items()
                      if not re.search("bwd|bprop|cutlassB|backward", name, re.I))
        row(f"attention's forward, {layers} blocks, {'compiled' if compiled else 'eager'}, checkpointing {how}: runs",
            forward if cuda else None, runs)               # a CPU has no kernels to count
        for name, count in kernels.items():
            row(f"    {count} x {name[:100]}")
        assert forward == runs or not cuda
        del net
        free()


def gradients(length, backend):
    """Seconds of forward and backward, the output and the gradients of q, k and v (1,heads,length,head_dim)."""
    q, k, v = (randn(1, heads, length, head_dim).roll(i, dims=-2).requires_grad_() for i in range(3))

    def work():
        q.grad = k.grad = v.grad = None
        with sdpa_kernel(backend):
            out = nnf.scaled_dot_product_attention(q, k, v)
        out.square().sum().backward()
        return out.detach(), q.grad, k.grad, v.grad

    seconds, _, result = clock(work)
    return seconds, result


for length in c["lengths"]:
    flash, expected = gradients(length, SDPBackend.FLASH_ATTENTION)
    other = SDPBackend.CUDNN_ATTENTION if cuda else SDPBackend.MATH
    cudnn, result = gradients(length, other)               # `clock` fails where a number is not finite
    row(f"attention, forward + backward, {length:,} tokens: cuDNN : flash", cudnn, flash)
    off = max(relative(a, b) for a, b in zip(result, expected))
    row("    relative difference, in bf16; expected below", off, 0.05)
    assert off < 0.05
    free()
