"""What the scripts on a GPU share: sizes, random networks, a clock, a row of the table.

    python tests/gpu/block.py '{"device": "cuda", …}'       as tests/test_gpu.py calls them; the JSON is its SIZES

This folder is on the path of its scripts, the repository by PYTHONPATH. Nothing of tests/ is imported: that hides GPUs.
"""
import gc, json, math, statistics, sys, time
from importlib.util import find_spec

from support.weights import empty
import model
from realdpo import Condition
import torch

c = json.loads(sys.argv[1])
device, bf16, cuda, diffusers = torch.device(c["device"]), torch.bfloat16, c["device"] == "cuda", find_spec("diffusers")
dit = c["dit_config"] | c["dit"]
heads, head_dim, n_text = dit["num_attention_heads"], dit["attention_head_dim"], dit["max_text_seq_length"]
width, frames = heads * head_dim, (dit["sample_frames"] - 1) // 4 + 1
shape = dit["out_channels"], frames, dit["sample_height"], dit["sample_width"]
grid = frames, shape[2] // 2, shape[3] // 2
tokens = n_text + math.prod(grid)

def row(item, ours=None, theirs=None, peak=None, their_peak=None):
    """Print a row: seconds, or what the item says, of ours and theirs, their ratio, and peaks in GiB."""
    numbers = ours, theirs, ours / theirs if ours and theirs else None, peak, their_peak
    cells = ["" if number is None else f"{number:.4f}" for number in numbers]
    print(f"{item:70}", *[f"{cell:>9}" for cell in cells], flush=True)

def agree(ours, theirs, most):
    """Fail where tensors differ by more, in their norms, than bf16 explains."""
    off = max(((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in zip(ours, theirs))
    row("    relative difference, in bf16; expected below", off, most)
    assert off < most

@torch.no_grad()
def fill(net):
    """The same numbers at each call: weights that keep the variance, norms near one."""
    rng = torch.Generator(device).manual_seed(0)
    for name, x in net.state_dict().items():
        x = x.to_local() if hasattr(x, "to_local") else x
        mean = float(x.ndim == 1 and "norm" in name and name.endswith("weight"))
        x.normal_(mean, x[0].numel() ** -0.5 if x.ndim > 1 else 0.02, generator=rng)
    return net

def randn(*size):
    """Seeded noise on the device, in bf16."""
    return torch.randn(size, generator=torch.Generator().manual_seed(0)).to(device, bf16)

def condition():
    """Random text and image latents of one sample."""
    return Condition(randn(1, n_text, dit["text_embed_dim"]), randn(1, shape[0], 1, *shape[2:]))

def denoiser(layers, compiled=False, dtype=bf16, shard=lambda net: None):
    """A random transformer of so many blocks."""
    net = fill(empty(model.DiT, dit | {"num_layers": layers}, dtype, device, shard))
    if compiled:
        net.compile_blocks()
    return model.Denoiser(net, model.VPrediction(c["scheduler"]), None)

def clock(work, repeats=c["repeats"], warm=2):
    """Median seconds and peak GiB of work(), after calls that compile and choose kernels; and its result, a tensor or
    several. Fails where a number of it is not finite."""
    seconds, result = [], None
    for number in range(warm + repeats):
        if cuda and number == warm:
            torch.cuda.reset_peak_memory_stats()
        result, begin = None, time.perf_counter()
        result = work()
        torch.cuda.synchronize() if cuda else None
        seconds.append(time.perf_counter() - begin)
    for x in [result] if isinstance(result, torch.Tensor) else result:
        assert x.isfinite().all(), "not finite"
    return statistics.median(seconds[warm:]), torch.cuda.max_memory_allocated() / 2 ** 30 if cuda else None, result

def free():
    """Give back what compiled code and caches hold."""
    torch.compiler.reset()
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
