"""Steps that compare: the first loss, the time, and the memory of each way against what train.py computes."""
import math, threading
from functools import partial

from common import bf16, c, check_finite, clock, condition, cuda, denoiser, device, dit, free, randn, row, shape
import torch
import torch.distributed as dist
import train


class Made(list):
    """Records made here, with the names and the reading that train_step asks for."""
    names = ["made"]

    def read(self, index, negatives):
        kept = dict(self[index])
        if not negatives:
            del kept["lose"]
        return kept


def stepper(layers, setting, lr):
    """A step of one sample, the list that its losses go to, and what train.py computes of it."""
    options = train.Options(batch=1, lr=lr, warmup=0, compare_every=1, checkpointing=setting.checkpointing,
                            graphs=setting.graphs)
    split = partial(train.shard, mesh=mesh, dtype=bf16, offload=setting.offload)
    where = "cpu" if setting.offload else device
    policy, reference = (denoiser(layers, torch.float32, split, where) for _ in range(2))
    policy.checkpointing, policy.holds_gradients = train.CHECKPOINTING[setting.checkpointing], setting.held
    policy.train(), reference.requires_grad_(False)
    optimizer, losses = train.make_optimizer(policy, options), []
    text, image = (x[0].cpu() for x in condition())
    records = Made([dict(win=randn(*shape).cpu(), lose=0.9 * randn(3, *shape).cpu(), text=text, image=image)])

    def work():
        metrics, _ = train.train_step(policy, reference, optimizer, records, options, len(losses), process, never)
        losses.append(metrics)
        return torch.tensor(list(metrics.values()))

    return work, losses, train.Work(options, dit | {"num_layers": layers}, shape, 3)


never = threading.Event()
process, mesh = train.init_distributed()
process = process._replace(dtype=bf16)
plain = train.Setting(False, "selective", "two", False)

work, losses, _ = stepper(2, plain, lr=0.0)
for _ in range(20):
    check_finite(work())
off = max(abs(metrics["preference"] - math.log(2)) for metrics in losses)
row("20 losses of policy = reference, lr 0: most |loss - log 2|", off, 0)
assert abs(losses[0]["preference"] - math.log(2)) < 1e-3, losses[0]
del work
free()



def compare(layers, settings):
    """Time and memory of a step in each way, against what train.py computes; their first steps are to agree."""
    first = None
    for setting in settings:
        work, losses, computed = stepper(layers, setting, lr=1e-6)
        seconds, peak, _ = clock(work, repeats=1, warm=1)
        memory = computed.memory(setting, 1)
        guess = memory.pop("context, NCCL, fragments (guessed)")
        words = f"graphs {setting.graphs}{', offload' * setting.offload}{', gradients held' * setting.held}"
        row(f"step, {layers} blocks, {words}; measured : computed", seconds,
            computed.seconds(setting, 1, 1, train.PEAK["H200"]), peak, sum(memory.values()) / 2 ** 30)
        row("    useful TFLOP/s", computed.flops(setting)[0] / seconds / 1e12)
        assert peak is None or peak < (sum(memory.values()) + guess) / 2 ** 30, "more than computed"
        first = first or losses[0]
        for name in ("loss", "win", "lose", "grad_norm"):
            off = abs(losses[0][name] / first[name] - 1)
            assert off < 0.02, (words, name, losses[0][name], first[name])
        del work
        free()


room = torch.cuda.mem_get_info()[0] / 2 ** 30 if cuda else 24
layers = min(dit["num_layers"], int((room - c["reserve"]) / c["block_gib"]))
compare(layers, [train.Setting(False, "selective", graphs, False) for graphs in ("all", "two", "one")])
compare(max(2, layers // 4), [plain, train.Setting(True, "selective", "two", False),
                              train.Setting(True, "full", "one", True)])
dist.destroy_process_group()
