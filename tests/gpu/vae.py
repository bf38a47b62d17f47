"""The autoencoder at 49×480×720, by the size of its pieces, against diffusers' whole and in tiles."""
from common import bf16, c, clock, device, diffusers, fill, frames, randn, relative, row, shape
import model
import torch

config = c["vae_config"] | c["vae"]
video, latents = randn(1, 3, 4 * frames - 3, 8 * shape[2], 8 * shape[3]).clamp(-1, 1), randn(1, *shape)
ours, result, vae = {}, {}, fill(model.empty(model.VAE, config, bf16, device))
calls = {"encode": lambda: vae.encode(video), "decode": lambda: vae.decode(latents)}
for size in c["pieces"]:
    model.CausalConv3d.piece_size = 2 ** size
    for way, call in calls.items():
        seconds, peak, result[way] = clock(call, repeats=1, warm=1)
        ours[way, size] = seconds, peak
        row(f"VAE {way}, {tuple(video.shape[2:])}, pieces of 2^{size} numbers", seconds, peak=peak)
if diffusers:
    weights = {k: v.cpu() for k, v in vae.state_dict().items()}
    del vae
    theirs = diffusers.AutoencoderKLCogVideoX(**{k: v for k, v in config.items() if k[0] != "_"})
    theirs.load_state_dict(weights)
    theirs.to(device, bf16).eval()
    calls = {"encode": lambda: theirs.encode(video).latent_dist.mean * config["scaling_factor"],
             "decode": lambda: theirs.decode(latents / config["scaling_factor"]).sample}
    for way, call in calls.items():
        for tiled in (False, True):
            if tiled:
                theirs.enable_tiling()
            else:
                theirs.disable_tiling()
            seconds, peak, expected = clock(torch.no_grad()(call), repeats=1, warm=1)
            best, best_peak = min(ours[way, size] for size in c["pieces"])
            words = "in tiles" if tiled else "whole"
            row(f"VAE {way}, our fastest : diffusers {words}", best, seconds, best_peak, peak)
            if not tiled:
                off = relative(result[way], expected)
                row("    relative difference, in bf16; expected below", off, 0.1)
                assert off < 0.1
