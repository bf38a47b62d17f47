"""What the scripts on a GPU share: sizes, random networks, a clock, a row of the table.

    python tests/gpu/block.py '{"device": "cuda", …}'       as tests/test_gpu.py calls them; the JSON is its SIZES

This folder is on the path of its scripts, the repository by PYTHONPATH. Nothing of tests/ is imported: that hides GPUs.
"""
import gc, json, math, statistics, sys, time, warnings

import model
import torch

from realdpo import Condition

try:
    import diffusers
    diffusers.logging.set_verbosity_error()
except ImportError:
    diffusers = None

warnings.filterwarnings("ignore")
c = json.loads(sys.argv[1])
device, bf16, cuda = torch.device(c["device"]), torch.bfloat16, c["device"] == "cuda"
dit = model.PUBLISHED_DIT | c["dit"]
heads, head_dim, n_text = dit["num_attention_heads"], dit["attention_head_dim"], dit["max_text_seq_length"]
width, frames = heads * head_dim, (dit["sample_frames"] - 1) // 4 + 1
shape = dit["out_channels"], frames, dit["sample_height"], dit["sample_width"]
grid = frames, shape[2] // 2, shape[3] // 2
tokens = n_text + math.prod(grid)


def row(item, ours=None, theirs=None, peak=None, their_peak=None):
    """Print a row: seconds, or what the item says, of ours and theirs, their ratio, and peaks in GiB."""
    ratio = ours / theirs if ours and theirs else None
    cells = []
    for number, digits in ((ours, 4), (theirs, 4), (ratio, 2), (peak, 2), (their_peak, 2)):
        cells.append(" " * 9 if number is None else f"{number:9.{digits}f}")
    print(f"{item:70}", *cells, flush=True)


@torch.no_grad()
def fill(net):
    """The same numbers at each call: weights that keep the variance, norms near one."""
    rng = torch.Generator(device).manual_seed(0)
    for name, x in net.state_dict().items():
        x = x.to_local() if hasattr(x, "to_local") else x
        here = torch.empty(x.shape, dtype=x.dtype, device=device)       # x may lie in CPU memory, for --offload
        if x.ndim > 1:
            here.normal_(0, x[0].numel() ** -0.5, generator=rng)
        else:
            here.normal_(float("norm" in name and name.endswith("weight")), 0.02, generator=rng)
        x.copy_(here)
    return net


def randn(*size):
    """Seeded noise on the device, in bf16."""
    return torch.randn(size, generator=torch.Generator().manual_seed(0)).to(device, bf16)


def condition():
    """Random text and image latents of one sample."""
    return Condition(randn(1, n_text, dit["text_embed_dim"]), randn(1, shape[0], 1, *shape[2:]))


def denoiser(layers, dtype=bf16, shard=lambda net: None, where=device):
    """A random transformer of so many blocks."""
    net = fill(model.empty(model.DiT, dit | {"num_layers": layers}, dtype, where, shard))
    return model.Denoiser(net, model.VPrediction(c["scheduler"]), c["scheduler"])


def check_finite(out):
    """Fail where a tensor, or one of several, has numbers that are not finite."""
    for x in out if isinstance(out, (tuple, list)) else [out]:
        assert x.isfinite().all(), "not finite"


def clock(work, repeats=c["repeats"], warm=2):
    """Median seconds and peak GiB of work(), after calls that compile and choose kernels; and its result."""
    for _ in range(warm):
        work()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    seconds, result = [], None
    for _ in range(repeats):
        result, begin = None, time.perf_counter()
        result = work()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    peak = torch.cuda.max_memory_allocated() / 2 ** 30 if cuda else None
    check_finite(result)
    return statistics.median(seconds), peak, result


def relative(ours, theirs):
    """The norm of the difference, relative to theirs."""
    return ((ours.float() - theirs.float()).norm() / theirs.float().norm()).item()


def free():
    """Give back what compiled code and caches hold."""
    torch.compiler.reset()
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
