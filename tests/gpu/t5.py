"""The text encoder."""
from common import bf16, c, clock, device, fill, n_text, row
import model
import torch

config = c["t5_config"] | c["t5"]
net = fill(model.empty(model.T5Encoder, config, bf16, device))
ids = torch.randint(3, config["vocab_size"], (8, n_text), generator=torch.Generator().manual_seed(0)).to(device)
seconds, peak, _ = clock(torch.no_grad()(lambda: net(ids)))
row(f"T5 encoder, {sum(p.numel() for p in net.parameters()) / 1e9:.2f} G parameters, 8 prompts of {n_text} tokens",
    seconds, peak=peak)
