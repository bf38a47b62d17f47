"""The autoencoder at 49×480×720, by the size of its pieces, against diffusers' whole and in tiles."""
from itertools import product

from common import agree, bf16, c, clock, device, diffusers, empty, fill, frames, randn, row, shape
import model
import torch

config = c["vae_config"] | c["vae"]
video, latents = randn(1, 3, 4 * frames - 3, 8 * shape[2], 8 * shape[3]).clamp(-1, 1), randn(1, *shape)
ours, result, vae = {}, {}, fill(empty(model.VAE, config, bf16, device))
calls = {"encode": lambda: vae.encode(video), "decode": lambda: vae.decode(latents)}
for size, way in product(c["pieces"], calls):
    model.CausalConv3d.piece_size = 2 ** size
    seconds, peak, result[way] = clock(calls[way], repeats=1, warm=1)
    ours[way] = min(ours.get(way, (seconds, peak)), (seconds, peak))
    row(f"VAE {way}, {tuple(video.shape[2:])}, pieces of 2^{size} numbers", seconds, peak=peak)
if diffusers:
    import diffusers
    weights = {k: v.cpu() for k, v in vae.state_dict().items()}
    del vae
    theirs = diffusers.AutoencoderKLCogVideoX(**{k: v for k, v in config.items() if k[0] != "_"})
    theirs.load_state_dict(weights)
    theirs.to(device, bf16).eval()
    calls = {"encode": lambda: theirs.encode(video).latent_dist.mean * config["scaling_factor"],
             "decode": lambda: theirs.decode(latents / config["scaling_factor"]).sample}
    for words, way in product(("whole", "in tiles"), calls):
        if words == "in tiles":
            theirs.enable_tiling()
        seconds, peak, expected = clock(torch.no_grad()(calls[way]), repeats=1, warm=1)
        row(f"VAE {way}, our fastest : diffusers {words}", ours[way][0], seconds, ours[way][1], peak)
        if words == "whole":
            agree([result[way]], [expected], 0.1)
