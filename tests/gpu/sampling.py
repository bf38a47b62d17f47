"""Sampling with guidance, one video and three at once, eager and compiled."""
from functools import partial

from common import c, clock, condition, denoiser, dit, free, randn, row, shape
import realdpo

def sample(net, videos, steps):
    cond = condition()
    return realdpo.sample(net, randn(videos, *shape), cond.repeat(videos), steps=steps, guidance=6.0, uncond=-cond.text,
                          progress=False)

for compiled, videos in ((False, 1), (False, 3), (True, 1)):
    net = denoiser(dit["num_layers"], compiled)
    sample(net, videos, 2)                                 # compiles
    seconds, peak, _ = clock(partial(sample, net, videos, c["steps"]), repeats=1, warm=0)
    row(f"{videos} videos, {dit['num_layers']} blocks, {'compiled' if compiled else 'eager'}: "
        f"50 steps, {c['steps']} of them timed", seconds * 50 / c["steps"], peak=peak)
    del net
    free()
