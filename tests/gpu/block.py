"""One block of the transformer, forward and backward, eager and compiled, against diffusers'."""
from itertools import product

from common import (agree, bf16, clock, device, diffusers, fill, free, grid, head_dim, heads, n_text, randn, row,
                    tokens, width)
import model
import torch

def measure(side, compiled, backward):
    """Seconds, peak GiB, and outputs and gradients of one block: "ours" or "theirs"."""
    text, video = [randn(1, length, width).requires_grad_(backward) for length in (n_text, tokens - n_text)]
    when, turn = randn(1, 512), model.rope_table(grid, n_text, head_dim, device)
    block = fill(model.Block(width, heads, 512, 1e-5).to(device, bf16))
    if side == "theirs":
        from diffusers.models.embeddings import get_3d_rotary_pos_embed
        from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock
        weights, block = block.state_dict(), CogVideoXBlock(width, heads, head_dim, 512, attention_bias=True)
        block.to(device, bf16).load_state_dict(weights)
        turn = [x.to(device) for x in get_3d_rotary_pos_embed(head_dim, ((0, 0), grid[1:]), grid[1:], grid[0])]
    run = torch.compile(block) if compiled else block

    def work():
        with torch.set_grad_enabled(backward):
            out = run(text, video, when, turn) if side == "ours" else run(video, text, when, turn)[::-1]
        if not backward:
            return out
        block.zero_grad()
        text.grad = video.grad = None
        (out[0].sum() + out[1].sum()).backward()
        return *(x.detach() for x in out), text.grad, video.grad

    seconds, peak, result = clock(work)
    free()
    return seconds, peak, [x.float().cpu() for x in result]

for compiled, backward in product((False, True), repeat=2):
    seconds, peak, result = measure("ours", compiled, backward)
    their_seconds, their_peak, expected = measure("theirs", compiled, backward) if diffusers else (None, None, result)
    row(f"block, forward{' + backward' * backward}, {'compiled' if compiled else 'eager'}, {tokens:,} tokens",
        seconds, their_seconds, peak, their_peak)
    agree(result, expected, 0.05)
