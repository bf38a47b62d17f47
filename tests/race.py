"""One side of a race against the libraries, in a process of its own: tests/test_bench.py starts it.

    python tests/race.py "DiT forward" ours FOLDER 1 5 32 40      prints seconds of the second call and the peak in MiB

What a side imports and prepares is not timed. The repository is on the path by PYTHONPATH; tests/ is not imported.
"""
import copy, sys, time
from pathlib import Path

import model
import torch
import torch.nn.functional as nnf

from realdpo import Condition, realdpo_loss, streamed_realdpo_loss

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


def dit_forward(side, folder, *sizes):
    if side == "theirs":
        forward, net, x = their_dit(folder, *sizes)
        return torch.no_grad()(lambda: forward(net, x))
    net, x, cond, t = our_dit(folder, *sizes)
    return torch.no_grad()(lambda: net(x, cond, t))


def dit_backward(side, folder, *sizes):
    if side == "theirs":
        forward, net, x = their_dit(folder, *sizes)
        return lambda: forward(net, x).sum().backward()
    net, x, cond, t = our_dit(folder, *sizes)
    return lambda: net(x, cond, t).sum().backward()


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


def our_step(folder, negatives, graphs, *sizes):
    """Ours with so many negatives, "all", "two" or "one" graph at a time."""
    net, x, cond, t = our_dit(folder, *sizes)
    ref = model.load_dit(folder).requires_grad_(False)
    net.checkpointing = "selective"
    given = dict(win=x, lose=torch.randn(len(x), negatives, *x.shape[1:]), cond=cond, beta=5000)

    def work():
        if graphs == "all":
            loss, _ = realdpo_loss(net, ref, **given)
        else:
            loss, _ = streamed_realdpo_loss(net, ref, **given, graphs=graphs)
        loss.backward()

    return work


def step(negatives, graphs):
    def prepare(side, folder, *sizes):
        if side == "theirs":
            return their_step(folder, *sizes)
        return our_step(folder, negatives, graphs, *sizes)
    return prepare


def vae(way):
    def prepare(side, folder, f, h, w):
        if side == "theirs":
            import diffusers
            net = diffusers.AutoencoderKLCogVideoX.from_pretrained(folder / "vae").eval()
        else:
            net = model.load_vae(folder)
        if way == "encode":
            x = torch.rand(1, 3, f, h, w) * 2 - 1
        else:
            x = torch.randn(1, 16, (f - 1) // 4 + 1, h // 8, w // 8)
        return torch.no_grad()(lambda: getattr(net, way)(x))
    return prepare


def t5(side, folder):
    ids = torch.randint(3, 1000, (8, TEXT[0]))
    if side == "theirs":
        import transformers
        net = transformers.T5EncoderModel.from_pretrained(folder / "text_encoder").eval()
    else:
        config = model.read_config(folder, "text_encoder", "T5EncoderModel")
        net = model.empty(model.T5Encoder, config, torch.float32, "cpu")
        model.read_weights(net, folder / "text_encoder")
    return torch.no_grad()(lambda: net(ids))


RACES = {"DiT forward": dit_forward, "DiT forward and backward": dit_backward, "RealDPO step": step(3, "two"),
         "RealDPO step, one negative of three": step(1, "two"), "RealDPO step, one negative, one graph": step(1, "one"),
         "VAE encode": vae("encode"), "VAE decode": vae("decode"), "T5": t5}

if __name__ == "__main__":
    name, side, folder, *sizes = sys.argv[1:]
    torch.manual_seed(0)
    work = RACES[name](side, Path(folder), *map(int, sizes))
    work()
    begin = time.time()
    work()
    seconds = time.time() - begin
    status = Path("/proc/self/status").read_text()
    print(seconds, int(status.split("VmHWM:")[1].split()[0]) / 1024)
