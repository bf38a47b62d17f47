"""Steps that compare: the first loss, the time, and the memory of each way against what support/budget.py computes."""
import math
from functools import partial
from threading import Event

from common import bf16, c, clock, condition, cuda, denoiser, dit, free, randn, row, shape, tokens, width
from support.budget import GIB, PEAK, UTILISATION, Work
import torch
import torch.distributed as dist
import train

class Made(list):
    """Records made here, with the names and the reading that train_step asks for."""
    names = ["made"]

    def read(self, index, negatives):
        return dict(self[index])

def stepper(layers, lr, checkpointing="selective", graphs="two"):
    """A step of one sample, the list that its metrics go to, and what is computed of it."""
    options = train.Options(batch=1, lr=lr, warmup=0, decay=0.0, compare_every=1, checkpointing=checkpointing,
                            graphs=graphs)
    split = partial(train.shard, mesh=mesh, dtype=bf16)
    policy, reference = [denoiser(layers, False, torch.float32, split) for _ in range(2)]
    policy.checkpointing = train.CHECKPOINTING[checkpointing]
    policy.train(), reference.requires_grad_(False)
    optimizer, found = train.make_optimizer(policy, options), []
    text, image = [x[0].cpu() for x in condition()]
    records = Made([dict(win=randn(*shape).cpu(), lose=0.9 * randn(3, *shape).cpu(), text=text, image=image)])

    def work():
        step = len(found)
        found.append(train.train_step(policy, reference, optimizer, records, options, step, process, mesh, Event())[0])
        return torch.tensor(list(found[step].values()))

    size = sum(p.numel() for p in policy.parameters())
    return work, found, Work(options, size, layers, width, tokens, negatives=3)

process, mesh = train.init_distributed()
work, found, _ = stepper(2, lr=0.0)
clock(work, repeats=20, warm=0)
off = [abs(metrics["preference"] - math.log(2)) for metrics in found]
row("20 losses of policy = reference, lr 0: most |loss - log 2|", max(off), 0)
assert off[0] < 1e-3, found[0]
del work
free()

room = torch.cuda.mem_get_info()[0] / GIB if cuda else 24
layers = min(dit["num_layers"], int((room - c["reserve"]) / c["block_gib"]))
first = None
for checkpointing, graphs in (("selective", "all"), ("selective", "two"), ("full", "two")):
    work, found, computed = stepper(layers, 1e-6, checkpointing, graphs)
    seconds, peak, _ = clock(work, repeats=1, warm=1)
    most = sum(computed.memory(1).values()) / GIB          # with a guess of what is beside the networks
    words = f"step, {layers} blocks, checkpointing {checkpointing}, graphs {graphs}"
    row(f"{words}; measured : computed", seconds, computed.flops() / PEAK["H200"] / UTILISATION, peak, most)
    row("    TFLOP/s", computed.flops() / seconds / 1e12)
    assert peak is None or peak < most, "more than computed"
    first = first or found[0]
    for name in ("loss", "win", "lose", "grad_norm"):      # the same step in every way
        assert abs(found[0][name] / first[name] - 1) < 0.02, (words, name, found[0][name], first[name])
    del work
    free()
dist.destroy_process_group()
