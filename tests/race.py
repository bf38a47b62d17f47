"""One side of a race against the libraries, in a process of its own: tests/test_bench.py starts it.

    python tests/race.py "DiT forward" ours FOLDER 1 5 32 40      prints seconds of the second call and the peak in MiB

What a side imports and prepares is not timed. The repository is on the path by PYTHONPATH; tests/ is not imported.
"""
import copy, sys, time
from functools import partial
from pathlib import Path

from support.folders import Stored, read_config
from support.weights import empty, fill
import model
import torch
import torch.nn.functional as nnf

from realdpo import Condition, streamed_realdpo_loss

TEXT = 226, 256                                            # tokens, width

def their_dit(folder, b, f, h, w):
    """diffusers' transformer, (forward(net, x), net, x)."""
    import diffusers
    from diffusers.models.embeddings import get_3d_rotary_pos_embed
    net = diffusers.CogVideoXTransformer3DModel.from_pretrained(folder / "transformer")
    x, text, k = torch.randn(b, f, 32, h, w), torch.randn(b, *TEXT), torch.full((b,), 500)
    rope = get_3d_rotary_pos_embed(64, ((0, 0), (h // 2, w // 2)), (h // 2, w // 2), f)

    def forward(net, x):
        return net(x, text, k, image_rotary_emb=rope, return_dict=False)[0]

    return forward, net, x

def our_dit(folder, b, f, h, w):
    """Our transformer, (net, x, cond, t)."""
    cond, t = Condition(torch.randn(b, *TEXT), torch.randn(b, 16, 1, h, w)), torch.full((b,), 0.5)
    return model.load_dit(folder), torch.randn(b, 16, f, h, w), cond, t

def dit(backward, side, folder, *sizes):
    call, *given = their_dit(folder, *sizes) if side == "theirs" else our_dit(folder, *sizes)
    if backward:
        return lambda: call(*given).sum().backward()
    return torch.no_grad()(lambda: call(*given))

def their_step(folder, *sizes):
    """The authors' algorithm: each negative with two policy and two reference forwards and a backward of its own."""
    forward, net, x = their_dit(folder, *sizes)
    ref = copy.deepcopy(net).requires_grad_(False)
    net.train().enable_gradient_checkpointing()

    def error(net, x):
        return (forward(net, x) - x[:, :, :16]).square().mean()

    def work():
        for _ in range(3):
            difference = error(net, x) - error(net, x + 1)
            with torch.no_grad():
                reference = error(ref, x) - error(ref, x + 1)
            (-nnf.logsigmoid(-2500 * (difference - reference)) / 3).backward()

    return work

def step(negatives, graphs, side, folder, *sizes):
    """A RealDPO step; ours with so many negatives, and "two" graphs or "one" at a time."""
    if side == "theirs":
        return their_step(folder, *sizes)
    net, x, cond, t = our_dit(folder, *sizes)
    ref = model.load_dit(folder).requires_grad_(False)
    net.checkpointing = "selective"
    given = dict(win=x, lose=torch.randn(len(x), negatives, *x.shape[1:]), cond=cond, beta=5000, t=t,
                 noise=torch.randn_like(x), graphs=graphs)
    return lambda: streamed_realdpo_loss(net, ref, **given)[0].backward()

def vae(way, side, folder, f, h, w):
    if side == "theirs":
        import diffusers
        net = diffusers.AutoencoderKLCogVideoX.from_pretrained(folder / "vae").eval()
    else:
        net = model.load_vae(folder)
    shapes = {"encode": (1, 3, f, h, w), "decode": (1, 16, (f - 1) // 4 + 1, h // 8, w // 8)}
    return torch.no_grad()(partial(getattr(net, way), torch.randn(shapes[way])))

def t5(side, folder):
    if side == "theirs":
        import transformers
        net = transformers.T5EncoderModel.from_pretrained(folder / "text_encoder").eval()
    else:
        config = read_config(folder, "text_encoder", "T5EncoderModel")
        net = empty(model.T5Encoder, config, torch.float32, "cpu")
        fill(net.state_dict(), Stored(folder / "text_encoder"))
    return torch.no_grad()(partial(net, torch.randint(3, 1000, (8, TEXT[0]))))

RACES = {"DiT forward": partial(dit, False), "DiT forward and backward": partial(dit, True),
         "RealDPO step": partial(step, 3, "two"), "RealDPO step, one negative of three": partial(step, 1, "two"),
         "RealDPO step, one negative, one graph": partial(step, 1, "one"),
         "VAE encode": partial(vae, "encode"), "VAE decode": partial(vae, "decode"), "T5": t5}

if __name__ == "__main__":
    name, side, folder, *sizes = sys.argv[1:]
    torch.manual_seed(0)
    work = RACES[name](side, Path(folder), *map(int, sizes))
    work()
    begin = time.time()
    work()
    seconds = time.time() - begin
    print(seconds, int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024)
