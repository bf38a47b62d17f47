"""What is being trained: text encoder → causal video autoencoder → diffusion transformer, CogVideoX's three networks.

Parameter names are the published checkpoint's, so loading needs no table and what we save opens in diffusers.

    encode_text = load_text_encoder("zai-org/CogVideoX-5b-I2V")    list of prompts -> (B, 226, 4096)
    vae         = load_vae("zai-org/CogVideoX-5b-I2V")             .encode(video), .decode(latents)
    denoiser    = load_dit("zai-org/CogVideoX-5b-I2V")             denoiser(x_t, cond, t) -> the clean latents
    save_dit(denoiser, "my-model")                                 opens in diffusers

A model is a folder in the published layout (transformer/ vae/ text_encoder/ tokenizer/ scheduler/), a hub id, a
training run, one of its checkpoints (RUN/checkpoints/step-000200, or …/ref for its reference), or "tiny", in
assets/tiny.

Axes: B batch, C channels, F latent frames, H W latent height and width, L text tokens, S all tokens, D width.
"""
import math
from collections import OrderedDict
from functools import lru_cache, partial
from pathlib import Path

from support import UserError
from support.command import generator
from support.files import fingerprint_of_weights, write_json
from support.folders import ADAPTERS, Stored, base_of, find_transformer, read_config, read_dit_config, refuse, resolve
from support.weights import empty, fill, gather, own_rows, read_adapters, save_adapters, save_part
import torch
import torch.nn as nn
import torch.nn.functional as nnf
from einops import rearrange
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts


# ---- Text encoder: T5 v1.1 (Raffel et al. 2020; Shazeer 2020 for the gated feed-forward), encoder half only ---------

class T5Block(nn.Module):
    """Pre-norm self-attention, unscaled and with an additive position bias, then a gated-GELU feed-forward."""

    def __init__(self, c):
        super().__init__()
        width = c["d_model"]
        inner = c["num_heads"] * c["d_kv"]
        hidden = c["d_ff"]
        self.heads = c["num_heads"]
        linear, norm = partial(nn.Linear, bias=False), partial(nn.RMSNorm, width, eps=c["layer_norm_epsilon"])
        attention = {name: linear(width, inner) for name in "qkv"} | {"o": linear(inner, width)}
        gated = {"wi_0": linear(width, hidden), "wi_1": linear(width, hidden), "wo": linear(hidden, width)}
        self.layer = nn.ModuleList([                       # the nesting only reproduces the published names
            nn.ModuleDict({"SelfAttention": nn.ModuleDict(attention), "layer_norm": norm()}),
            nn.ModuleDict({"DenseReluDense": nn.ModuleDict(gated), "layer_norm": norm()})])

    def forward(self, x, bias):
        attention, gated = self.layer[0]["SelfAttention"], self.layer[1]["DenseReluDense"]
        h = self.layer[0]["layer_norm"](x)
        q, k, v = (rearrange(attention[n](h), "b l (h d) -> b h l d", h=self.heads) for n in "qkv")
        h = nnf.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)        # T5 never divides by sqrt(d)
        x = x + attention["o"](rearrange(h, "b h l d -> b l (h d)"))
        h = self.layer[1]["layer_norm"](x)
        return x + gated["wo"](nnf.gelu(gated["wi_0"](h), approximate="tanh") * gated["wi_1"](h))

class T5Encoder(nn.Module):
    """Token ids (B,L) -> embeddings (B,L,D). Padding is attended to like any token: CogVideoX was trained so."""

    def __init__(self, c):
        super().__init__()
        self.shared = nn.Embedding(c["vocab_size"], c["d_model"])
        blocks = nn.ModuleList([T5Block(c) for _ in range(c["num_layers"])])
        self.buckets, self.max_distance = c["relative_attention_num_buckets"], c["relative_attention_max_distance"]
        blocks[0].layer[0]["SelfAttention"]["relative_attention_bias"] = nn.Embedding(self.buckets, c["num_heads"])
        norm = nn.RMSNorm(c["d_model"], eps=c["layer_norm_epsilon"])
        self.encoder = nn.ModuleDict({"block": blocks, "final_layer_norm": norm})

    def position_bias(self, length, device):
        """(1,heads,L,L): one learned number a head and a bucket of key − query distance, shared by all blocks."""
        distance = torch.arange(length, device=device) - torch.arange(length, device=device)[:, None]
        half = self.buckets // 2                           # half the buckets look back, half ahead
        exact = half // 2                                  # near ones have a bucket each, far ones share, in log steps
        far = exact + (torch.log(distance.abs().clamp(min=1).float() / exact)
                       / math.log(self.max_distance / exact) * (half - exact)).long()
        bucket = torch.where(distance.abs() < exact, distance.abs(), far.clamp(max=half - 1)) + half * (distance > 0)
        table = self.encoder["block"][0].layer[0]["SelfAttention"]["relative_attention_bias"]
        return rearrange(table(bucket), "q k h -> 1 h q k")

    def forward(self, ids):
        x, bias = self.shared(ids), self.position_bias(ids.shape[1], ids.device)
        for block in self.encoder["block"]:
            x = block(x, bias)
        return self.encoder["final_layer_norm"](x)


# ---- Video autoencoder: 3-D convolutions that look into the past only (CogVideoX, Yang et al. 2024, Sec. 2.1) -------
# A clip passes in chunks of 8 frames (the odd first frame joins the first chunk), so memory does not grow with length.
# `past` carries the frames that each convolution still needs from chunk to chunk. Normalisation spans a chunk, so the
# chunking is part of the model: another one gives other latents. Within a chunk, operations with large temporaries take
# a few frames at a time, which changes nothing but the memory.

def chunks(length, size):
    """Slices of `size` that cover `length`; the remainder goes into the first: chunks(17, 8) -> [0:9], [9:17]."""
    starts = [0] + list(range(size + length % size, length, size))
    return [slice(a, b) for a, b in zip(starts, starts[1:] + [length])]

class Norm(nn.GroupNorm):
    """GroupNorm in two parts: scale and shift, computed from all of x, and `affine`, which applies them to pieces."""

    def scale_and_shift(self, x, z):
        """Scale and shift of x (B,C,F,H,W), each (B,C,F,1,1), fp32. Only SpatialNorm uses z."""
        # Summed frame by frame, then in fp64: a single fp32 sum over a long chunk loses the variance beside the mean.
        sums = 0
        for frame in x.unbind(2):
            frame = frame.float()
            sums = sums + torch.stack([frame.sum((2, 3)), frame.square().sum((2, 3))]).double()             # (2,B,C)
        sums = sums.unflatten(2, (self.num_groups, -1))                                                # (2,B,G,C/G)
        sums = sums.sum(3, keepdim=True).expand_as(sums).flatten(2)                                         # (2,B,C)
        count = x[0].numel() / self.num_groups             # numbers of a sample in a group
        mean, square = sums / count                                                                           # (B,C)
        std = ((square - mean ** 2).clamp(min=0) + self.eps).sqrt()                        # rounding may leave it < 0
        scale = self.weight / std
        shift = self.bias - mean * scale
        return [v.float()[:, :, None, None, None].expand(-1, -1, x.shape[2], -1, -1) for v in (scale, shift)]

class SpatialNorm(nn.Module):
    """GroupNorm with a further scale and shift, read off the latents z (Zheng et al. 2022, MoVQ)."""

    def __init__(self, groups, channels, latent_channels):
        super().__init__()
        self.norm_layer = Norm(groups, channels, eps=1e-6)
        self.conv_y = nn.ModuleDict({"conv": nn.Conv3d(latent_channels, channels, 1)})
        self.conv_b = nn.ModuleDict({"conv": nn.Conv3d(latent_channels, channels, 1)})

    def scale_and_shift(self, x, z):
        """Scale and shift of x (B,C,F,H,W) at z's height and width, (B,C,F,h,w), which `affine` stretches to x's."""
        scale, shift = self.norm_layer.scale_and_shift(x, z)
        # The latent frame of each frame; frame 0 of an odd clip has one to itself. Nine of three: 0 1 1 1 1 2 2 2 2.
        frames, odd = x.shape[2], x.shape[2] % 2
        source = [0] * odd + [odd + i * (z.shape[2] - odd) // (frames - odd) for i in range(frames - odd)]
        y, b = self.conv_y["conv"](z)[:, :, source], self.conv_b["conv"](z)[:, :, source]
        return scale * y, torch.addcmul(b, shift, y)

def affine(x, scale, shift):
    """x·scale + shift, after stretching scale and shift (nearest) to the size of x (B,C,F,H,W)."""
    if scale.shape[3:] != (1, 1):                          # one number for the whole frame broadcasts as it is
        scale, shift = nnf.interpolate(scale, x.shape[2:]), nnf.interpolate(shift, x.shape[2:])
    return torch.addcmul(shift, x, scale)

class CausalConv3d(nn.Module):
    """3×3×3 convolution of (B,C,F,H,W) that never sees the future: two past frames in front, zeros at the borders.
    With `norm`, a scale and a shift, `affine` and SiLU come first. With `overwrite` the result may take x's memory."""
    piece_size = 2 ** 21                                   # about as many numbers at a time, or one frame

    def __init__(self, c_in, c_out):
        super().__init__()
        self.conv = nn.Conv3d(c_in, c_out, 3, padding=(0, 1, 1))

    def forward(self, x, past, norm=None, overwrite=False):
        in_place = not torch.is_grad_enabled()
        out = x if overwrite and in_place else x.new_empty(len(x), self.conv.out_channels, *x.shape[2:])
        before = past.pop(self, None)                      # popped, so that its memory is free after the first piece
        size = self.frames_at_once(x)
        for i in range(0, x.shape[2], size):
            frames = slice(i, i + size)
            piece = x[:, :, frames]
            if norm:
                scale, shift = norm
                piece = affine(piece, scale[:, :, frames], shift[:, :, frames])
                piece = nnf.silu(piece, inplace=in_place).to(x.dtype)
            if before is None:                             # the clip begins: its first frame stands for the past
                before = piece[:, :, :1].expand(-1, -1, 2, -1, -1)
            piece = torch.cat([before, piece], dim=2)
            before = None                                  # freed before the convolution makes copies of its own
            out[:, :, frames] = self.conv(piece)
            before = piece[:, :, -2:].clone()              # a view would keep the whole piece alive
        past[self] = before
        return out

    def frames_at_once(self, x):
        """Frames of x (B,C,F,H,W) that hold about `piece_size` numbers where the convolution is widest, or one."""
        channels = max(self.conv.in_channels, self.conv.out_channels)
        numbers_a_frame = len(x) * channels * x.shape[3] * x.shape[4]
        return max(1, self.piece_size // numbers_a_frame)

class Resnet(nn.Module):
    """norm → SiLU → conv, twice, plus a shortcut. `norm(channels)` makes a norm."""

    def __init__(self, c_in, c_out, norm):
        super().__init__()
        self.norm1, self.conv1 = norm(c_in), CausalConv3d(c_in, c_out)
        self.norm2, self.conv2 = norm(c_out), CausalConv3d(c_out, c_out)
        self.conv_shortcut = nn.Conv3d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, past, z):
        h = self.conv1(x, past, self.norm1.scale_and_shift(x, z))
        h = self.conv2(h, past, self.norm2.scale_and_shift(h, z), overwrite=True)
        return h.add_(self.conv_shortcut(x))

class Downsample(nn.Module):
    """Halve height and width; with `time`, average frames in pairs first (in an odd clip frame 0 stays alone)."""

    def __init__(self, channels, time):
        super().__init__()
        self.conv, self.time = nn.Conv2d(channels, channels, 3, stride=2), time

    def forward(self, x):
        n = 2 if self.time and x.shape[2] > 1 else 1
        frames = x.split([1] * (x.shape[2] % n) + [n] * (x.shape[2] // n), dim=2)
        return torch.stack([self.conv(nnf.pad(f.mean(2), (0, 1, 0, 1))) for f in frames], dim=2)

class Upsample(nn.Module):
    """Double height and width; with `time`, also every frame (in an odd clip frame 0 stays alone)."""

    def __init__(self, channels, time):
        super().__init__()
        self.conv, self.time = nn.Conv2d(channels, channels, 3, padding=1), time

    def forward(self, x):
        odd = x.shape[2] % 2
        done = []
        for i, frame in enumerate(x.unbind(2)):            # one by one: each becomes four times, or eight, its size
            frame = self.conv(nnf.interpolate(frame, scale_factor=2.0))
            done += [frame] * (2 if self.time and x.shape[2] > 1 and i >= odd else 1)
        return torch.stack(done, dim=2)

class Coder(nn.Module):
    """The encoder ("down"), (B,3,F,H,W) -> mean and log-variance of the posterior, stacked (B,2C,f,h,w), or its mirror
    image, the decoder ("up"), (B,C,f,h,w) -> (B,3,F,H,W). Level i has `layers` resnets of widths[i] channels."""

    def __init__(self, direction, widths, layers, c_in, c_out, norm, resample, time_levels):
        super().__init__()
        self.direction = direction
        levels = nn.ModuleList()
        for i, (before, width) in enumerate(zip([widths[0], *widths], widths)):
            resnets = [Resnet(before if n == 0 else width, width, norm) for n in range(layers)]
            level = nn.ModuleDict({"resnets": nn.ModuleList(resnets)})
            if i < len(widths) - 1:
                level[f"{direction}samplers"] = nn.ModuleList([resample(width, time=i < time_levels)])
            levels.append(level)
        setattr(self, f"{direction}_blocks", levels)
        middle = widths[-1] if direction == "down" else widths[0]
        resnets = [Resnet(middle, middle, norm) for _ in range(2)]
        self.mid_block = nn.ModuleDict({"resnets": nn.ModuleList(resnets)})
        self.conv_in, self.conv_out = CausalConv3d(c_in, widths[0]), CausalConv3d(widths[-1], c_out)
        self.norm_out = norm(widths[-1])

    def forward(self, x, past):
        z = x.to(self.conv_in.conv.weight)                 # in the decoder the latents, which its norms look at
        x = self.conv_in(z, past)
        levels = [*self.down_blocks, self.mid_block] if self.direction == "down" else [self.mid_block, *self.up_blocks]
        for level in levels:
            for resnet in level["resnets"]:
                x = resnet(x, past, z)
            if f"{self.direction}samplers" in level:
                x = level[f"{self.direction}samplers"][0](x)
        return self.conv_out(x, past, self.norm_out.scale_and_shift(x, z))

class VAE(nn.Module):
    """Video (B,3,F,H,W) in [-1,1], F = 8k + 1, to scaled latents (B,C,(F-1)/4+1,H/8,W/8) and back."""

    def __init__(self, c):
        super().__init__()
        self.config = c
        self.scale = c["scaling_factor"]                   # which brings latents to about unit variance
        widths, layers = c["block_out_channels"], c["layers_per_block"]
        groups, latents = c["norm_num_groups"], c["latent_channels"]
        time_levels = int(math.log2(c["temporal_compression_ratio"]))
        self.encoder = Coder("down", widths, layers, c["in_channels"], 2 * latents,
                             partial(Norm, groups, eps=1e-6), Downsample, time_levels)
        self.decoder = Coder("up", widths[::-1], layers + 1, latents, c["out_channels"],
                             partial(SpatialNorm, groups, latent_channels=latents), Upsample, time_levels)

    def posterior(self, video):
        """Mean and standard deviation of q(latents | video), each (B,C,f,h,w), unscaled and fp32."""
        past = {}
        moments = [self.encoder(video[:, :, chunk], past) for chunk in chunks(video.shape[2], 8)]
        mean, logvar = torch.cat(moments, dim=2).float().chunk(2, dim=1)
        return mean, (0.5 * logvar.clamp(-30, 20)).exp()

    @torch.no_grad()
    def encode(self, video, generator=None):
        """Scaled latents, fp32: the posterior's mean, or a sample of it where a CPU `generator` is given.
        Raises ValueError unless video is (B,3,F,H,W) with F = 8k + 1."""
        if video.ndim != 5 or video.shape[1] != 3 or video.shape[2] % 8 != 1:
            raise ValueError(f"video is {tuple(video.shape)}, expected (B,3,F,H,W) with F = 8k + 1 frames")
        mean, std = self.posterior(video)
        if generator is not None:
            mean = mean + std * torch.randn(mean.shape, generator=generator).to(mean)
        return mean * self.scale

    @torch.no_grad()
    def decode(self, latents):
        """Video (B,3,F,H,W), fp32, about [-1,1], of scaled latents (B,C,f,h,w), f odd."""
        past = {}
        z = latents / self.scale
        return torch.cat([self.decoder(z[:, :, chunk], past).float() for chunk in chunks(z.shape[2], 2)], dim=2)


# ---- Diffusion transformer: text and video tokens in one sequence (CogVideoX, Sec. 2.2) -----------------------------

class AdaptiveNorm(nn.Module):
    """LayerNorm, and a linear map of the time embedding to `chunks` vectors (B,1,D) that shift, scale and gate."""

    def __init__(self, width, time_width, eps, chunks):
        super().__init__()
        self.linear = nn.Linear(time_width, chunks * width)
        self.norm = nn.LayerNorm(width, eps)
        self.chunks = chunks

    def forward(self, time):
        return self.linear(nnf.silu(time))[:, None].chunk(self.chunks, dim=-1)

    def modulate(self, x, shift, scale):
        return torch.addcmul(shift, self.norm(x), 1 + scale)                                                # (B,S,D)

@lru_cache(maxsize=8)
def rope_table(grid, n_text, head_dim, device):
    """Cosine and sine of each token's angles (S,1,head_dim/2,2), fp32: a quarter of a head turns with time, 3/8 with
    height, 3/8 with width. Text tokens stand at angle zero, so the whole sequence is rotated in one go."""
    parts = (head_dim // 4, head_dim // 8 * 3, head_dim // 8 * 3)
    frequencies = [10_000.0 ** (-torch.arange(0, n, 2, dtype=torch.float32) / n) for n in parts]
    positions = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float32) for n in grid))                 # (FHW,3)
    positions = torch.cat([torch.zeros(n_text, 3), positions])                                              # (S,3)
    angles = torch.cat([positions[:, i, None] * f for i, f in enumerate(frequencies)], dim=1)               # (S,d/2)
    return torch.view_as_real(torch.polar(torch.ones_like(angles), angles))[:, None].to(device)

def rotate(x, rope):
    """Turn adjacent pairs of features of x (B,S,heads,d), as points of a plane, by `rope_table`'s angles, in fp32."""
    pairs = x.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():                      # the compiler knows no complex numbers, but fuses all this
        (a, b), (cos, sin) = pairs.unbind(-1), rope.unbind(-1)
        turned = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1)
    else:                                                  # without it, one complex product touches memory least
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rope))
    return turned.flatten(-2).to(x.dtype)

ADAPTED = ("attn1", "ff")                                  # the layers that get adapters

class Projection(nn.Linear):
    """W·x + b and, with adapters of low rank R (Hu et al. 2022: LoRA, at scale 1), + B·(A·x).

    Policy and reference have an A (R,in) and a B (out,R) each on the one W, which is frozen then. B begins as zero, so
    both begin as W alone. Whose adapters count, `side` says: an argument and not a switch, since what the backward pass
    computes again runs after the other side's turn.
    """

    def adapt(self, rank):
        sides = {}
        for side in ("policy", "reference"):
            linear = partial(nn.Linear, bias=False, device=self.weight.device)
            sides[side] = nn.ModuleDict({"lora_A": linear(self.in_features, rank),
                                         "lora_B": linear(rank, self.out_features)})
        self.adapters = nn.ModuleDict(sides)

    def forward(self, x, side=None):
        out = super().forward(x)
        if side and hasattr(self, "adapters"):
            adapter = self.adapters[side]
            out = out + adapter["lora_B"](adapter["lora_A"](x))
        return out

class Attention(nn.Module):
    """Full self-attention over text and video, with LayerNorm on queries and keys and rotary positions."""

    def __init__(self, width, heads):
        super().__init__()
        self.to_q, self.to_k, self.to_v = (Projection(width, width) for _ in range(3))
        self.norm_q, self.norm_k = (nn.LayerNorm(width // heads, eps=1e-6) for _ in range(2))
        self.to_out = nn.Sequential(Projection(width, width))
        self.heads = heads

    def forward(self, x, rope, side=None):
        projections = self.to_q, self.to_k, self.to_v
        q, k, v = (rearrange(to(x, side), "b s (h d) -> b s h d", h=self.heads) for to in projections)
        q, k = rotate(self.norm_q(q), rope), rotate(self.norm_k(k), rope)            # as they lie in memory: no copies
        q, k, v = (rearrange(y, "b s h d -> b h s d") for y in (q, k, v))
        return self.to_out[0](rearrange(nnf.scaled_dot_product_attention(q, k, v), "b h s d -> b s (h d)"), side)

# What "selective" checkpointing keeps: the output of attention, half of a 5B block's work for one more activation.
ATTENTION = [getattr(torch.ops.aten, f"_scaled_dot_product_{kind}").default
             for kind in ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention")]

class Block(nn.Module):
    """Attention and feed-forward, shifted, scaled and gated by the time embedding; text has its own coefficients."""

    def __init__(self, width, heads, time_width, eps):
        super().__init__()
        self.norm1, self.attn1 = AdaptiveNorm(width, time_width, eps, 6), Attention(width, heads)
        self.norm2 = AdaptiveNorm(width, time_width, eps, 6)
        up = nn.Sequential(OrderedDict(proj=Projection(width, 4 * width), gelu=nn.GELU("tanh")))
        self.ff = nn.ModuleDict({"net": nn.Sequential(up, nn.Identity(), Projection(4 * width, width))})

    def forward(self, text, video, time, rope, checkpointing=False, side=None):
        """text (B,L,D) and video (B,FHW,D) after the block. `checkpointing` and `side`: see Denoiser."""
        if not checkpointing:
            return self.layers(text, video, time, rope, side)
        recompute = partial(checkpoint, self.layers, text, video, time, rope, side, use_reentrant=False)
        if checkpointing == "selective":
            return recompute(context_fn=partial(create_selective_checkpoint_contexts, ATTENTION))
        return recompute()

    def layers(self, text, video, time, rope, side=None):
        text, video = self.residual(self.norm1, partial(self.attn1, rope=rope, side=side), text, video, time)
        return self.residual(self.norm2, partial(self.feed_forward, side=side), text, video, time)

    def feed_forward(self, x, side):
        up, _, down = self.ff["net"]
        return down(up.gelu(up.proj(x, side)), side)

    def residual(self, norm, layer, text, video, time):
        """Add gate · layer(norm(·)) to text and video, which the layer sees as one sequence."""
        shift, scale, gate, text_shift, text_scale, text_gate = norm(time)
        h = torch.cat([norm.modulate(text, text_shift, text_scale), norm.modulate(video, shift, scale)], dim=1)
        # Split, not sliced: the backward pass of a slice is a whole tensor of zeros to copy into and to add.
        text_h, video_h = layer(h).split([text.shape[1], video.shape[1]], dim=1)
        return torch.addcmul(text, text_gate, text_h), torch.addcmul(video, gate, video_h)

class DiT(nn.Module):
    """The network F: noisy latents and image latents (B,2C,F,H,W), text (B,L,E), a time code -> (B,C,F,H,W)."""

    def __init__(self, c):
        super().__init__()
        self.config = c
        heads = c["num_attention_heads"]
        p = c["patch_size"]
        width = heads * c["attention_head_dim"]
        time_width = c["time_embed_dim"]
        eps = c["norm_eps"]
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(c["in_channels"], width, p, stride=p),
                                          "text_proj": nn.Linear(c["text_embed_dim"], width)})
        if c["use_learned_positional_embeddings"]:         # a buffer, not a parameter: published as one, never trained
            frames = (c["sample_frames"] - 1) // c["temporal_compression_ratio"] + 1
            self.learned_grid = frames, c["sample_height"] // p, c["sample_width"] // p
            tokens = c["max_text_seq_length"] + math.prod(self.learned_grid)
            self.patch_embed.register_buffer("pos_embedding", torch.zeros(1, tokens, width))
        self.time_embedding = nn.Sequential(OrderedDict(
            linear_1=nn.Linear(width, time_width), act=nn.SiLU(), linear_2=nn.Linear(time_width, time_width)))
        blocks = [Block(width, heads, time_width, eps) for _ in range(c["num_layers"])]
        self.transformer_blocks = nn.ModuleList(blocks)
        self.norm_final, self.norm_out = nn.LayerNorm(width, eps), AdaptiveNorm(width, time_width, eps, 2)
        self.proj_out = nn.Linear(width, p * p * c["out_channels"])

    def compile_blocks(self):
        for block in self.transformer_blocks:
            block.forward = torch.compile(block.forward, fullgraph=True)    # not the block: FSDP's hooks stay outside

    def adapt(self, rank):
        """Freeze everything, and give the projections adapters of a rank."""
        self.requires_grad_(False)
        for name, module in self.transformer_blocks.named_modules():
            if isinstance(module, Projection) and any(part in name for part in ADAPTED):
                module.adapt(rank)

    def forward(self, x, text, time_code, checkpointing=False, side=None):
        p, n_text = self.config["patch_size"], text.shape[1]
        f, h, w = x.shape[2], x.shape[3] // p, x.shape[4] // p
        time = self.time_embedding(time_code)                                                               # (B,T)
        # The convolution of the patches is a matrix product, since its stride is its kernel.
        patches = rearrange(x, "b c f (h p) (w q) -> b (f h w) (c p q)", p=p, q=p)
        proj = self.patch_embed["proj"]
        text = self.patch_embed["text_proj"](text)
        video = nnf.linear(patches, proj.weight.flatten(1), proj.bias)
        if self.config["use_learned_positional_embeddings"]:
            positions = self.learned_positions((f, h, w), n_text).to(text)                                  # (1,S,D)
            text, video = text + positions[:, :n_text], video + positions[:, n_text:]
        rope = rope_table((f, h, w), n_text, self.config["attention_head_dim"], x.device)
        for block in self.transformer_blocks:
            text, video = block(text, video, time, rope, checkpointing, side)
        shift, scale = self.norm_out(time)
        video = self.proj_out(self.norm_out.modulate(self.norm_final(video), shift, scale))
        return rearrange(video, "b (f h w) (c p q) -> b c f (h p) (w q)", f=f, h=h, w=w, p=p, q=p)

    def learned_positions(self, grid, n_text):
        """The learned table's rows for text and video (1,S,D). A shorter clip has the first; other sizes have none."""
        learned, length = self.learned_grid, self.config["max_text_seq_length"]
        if n_text != length or grid[0] > learned[0] or grid[1:] != learned[1:]:
            raise UserError(f"{n_text} text tokens and a token grid (frames, height, width) of {grid}; "
                            f"the learned positions are for {length} and at most {learned}")
        return self.patch_embed.pos_embedding[:, :n_text + math.prod(grid)]


# ---- Everything is a denoiser: the wrapping of F that predicts clean latents of x_t = (1 − t)·x₀ + t·ε (ψ, Eq. 4–5) -
# CogVideoX was trained to predict v = α·ε − σ·x₀ from z = α·x₀ + σ·ε with α² + σ² = 1. Here, noise is added along a
# straight line, x_t = (1−t)·x₀ + t·ε. Divided by s = √((1−t)² + t²), this *is* CogVideoX's z, with α = (1−t)/s and
# σ = t/s; the network is told the training step with the same α/σ. Its answer gives the clean latents, x̂₀ = α·z − σ·v.
# So CogVideoX is a flow-matching model after a change of variables, exactly, and no other file ever sees ε or v:
#
#     x̂₀ = D(x_t, c, t) = c_skip·x_t + c_out·F(c_in·x_t, c, c_noise)
#
#     F predicts                              c_in   c_skip   c_out   c_noise
#     flow velocity u = ε − x₀  (tiny)        1      1        −t      1000·t
#     v = α·ε − σ·x₀  (CogVideoX)             1/s    α/s      −σ      the training step of equal α/σ
#
# One Euler step of the flow, x ← x + (t′ − t)·(x − x̂₀)/t, is one DDIM step in CogVideoX's coordinates.

class FlowPrediction:
    """F predicts the flow velocity u = ε − x₀."""
    t_min = 0.0                                            # the smallest t that F was trained at

    def coefficients(self, t):
        return torch.ones_like(t), torch.ones_like(t), -t, 1000 * t                     # c_in, c_skip, c_out, c_noise

    def time_grid(self, steps):
        return torch.linspace(1, 0, steps + 1, dtype=torch.float64)

class VPrediction:
    """F predicts v = α·ε − σ·x₀ of a variance-preserving schedule, the published CogVideoX's."""

    def __init__(self, c):
        betas = torch.linspace(c["beta_start"] ** 0.5, c["beta_end"] ** 0.5, c["num_train_timesteps"],
                               dtype=torch.float64) ** 2
        alpha_bar = (1 - betas).cumprod(0)
        alpha_bar = alpha_bar / (c["snr_shift_scale"] + (1 - c["snr_shift_scale"]) * alpha_bar)
        root = alpha_bar.sqrt()
        alpha = (root - root[-1]) * root[0] / (root[0] - root[-1])              # zero terminal SNR (Lin et al. 2024)
        sigma = (1 - alpha ** 2).sqrt()
        self.t = sigma / (alpha + sigma)                   # t of each training step: 0.0283 … 1
        self.t_min = self.t[0].item()

    def coefficients(self, t):
        s = ((1 - t) ** 2 + t ** 2).sqrt()
        alpha, sigma = (1 - t) / s, t / s
        return 1 / s, alpha / s, -sigma, self.step(t)                                   # c_in, c_skip, c_out, c_noise

    def step(self, t):
        """The training step of t, linear between steps. Below the first it is 0, although x_t is cleaner than any that
        F was trained on, so training should draw no t below `t_min`."""
        table = self.t.to(t.device)
        k = torch.searchsorted(table, t.double().contiguous()).clamp(1, len(table) - 1)
        return (k - 1 + (t - table[k - 1]) / (table[k] - table[k - 1])).clamp(min=0)

    def time_grid(self, steps):
        trailing = torch.arange(len(self.t), 0, -len(self.t) / steps, dtype=torch.float64)[:steps].round().long() - 1
        return torch.cat([self.t[trailing], torch.zeros(1, dtype=torch.float64)])

def sinusoid(k, width):
    """(B,) -> (B,width), fp32: cosines then sines of k at `width`/2 frequencies from 1 down to 1/10000."""
    half = width // 2
    angles = k[:, None] * torch.exp(-math.log(10_000) / half * torch.arange(half, device=k.device))
    return torch.cat([angles.cos(), angles.sin()], dim=1)

class Denoiser(nn.Module):
    """denoiser(x_t (B,C,F,H,W), cond, t (B,)) -> x̂₀ (B,C,F,H,W), fp32.

    x̂₀ = c_skip·x_t + c_out·F(c_in·x_t, c, c_noise)   (form of Karras et al. 2022, Eq. 7; ψ∘θ of the paper's Eq. 4–5)

    `net` is F and the only part that runs in bf16. `checkpointing` True recomputes each block in the backward pass,
    "selective" all of it but its attention, False nothing. `time_grid(steps)` gives the times of a sampler with that
    many evaluations, steps + 1 numbers falling from 1 to 0, fp64; `t_min` is the smallest t the network was trained at.
    Two denoisers may share a network with adapters: then `side` is "policy" or "reference", whose adapters count, and
    `base` a fingerprint of the network without them.
    """
    checkpointing = False

    def __init__(self, net, prediction, scheduler, side=None, base=""):
        super().__init__()
        self.net, self.prediction, self.scheduler, self.side, self.base = net, prediction, scheduler, side, base
        self.time_grid, self.t_min = prediction.time_grid, prediction.t_min

    def own(self, named):
        """Those of the network's (name, tensor) pairs that training changes: all or, with adapters, this side's."""
        mark = f".adapters.{self.side}."
        for name, tensor in named:
            if not self.side or mark in name:
                yield name.replace(mark, "."), tensor                                   # by their published names

    def named_parameters(self, *_, **__):
        return self.own(self.net.named_parameters())

    def forward(self, x_t, cond, t):
        coefficients = self.prediction.coefficients(t.double())
        c_in, c_skip, c_out, c_noise = (c.float()[:, None, None, None, None] for c in coefficients)
        like = self.net.proj_out.weight.dtype
        image = nnf.pad(cond.image, (0, 0, 0, 0, 0, x_t.shape[2] - 1))                  # zeros after the first frame
        x = torch.cat([(c_in * x_t).to(like), image.to(like)], dim=1)                   # (B,2C,F,H,W)
        code = sinusoid(c_noise.flatten(), self.net.time_embedding.linear_1.in_features)
        output = self.net(x, cond.text.to(like), code.to(like), checkpointing=self.checkpointing, side=self.side)
        return c_skip * x_t + c_out * output.float()


# ---- The three networks of a model folder, and the way back ---------------------------------------------------------

def load_text_encoder(path, device="cpu", dtype=torch.float32):
    """Load tokenizer and T5 encoder. Returns `encode_text(prompts: list[str]) -> (B,L,D)` on `device`. Prompts are cut
    or padded to the transformer's `max_text_seq_length` L (226). Raises UserError if a part is missing or broken."""
    import sentencepiece
    folder = resolve(path, "tokenizer/spiece.model", "text_encoder", "transformer/config.json")
    config = read_config(folder, "text_encoder", "T5EncoderModel")
    net = empty(T5Encoder, config, dtype, device)
    fill(net.state_dict(), Stored(folder / "text_encoder"))
    spiece = folder / "tokenizer" / "spiece.model"
    try:
        tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(spiece))
    except (RuntimeError, OSError) as e:
        raise UserError(f"{spiece}: is no whole SentencePiece file ({e}); copy it from the published model") from e
    length = read_dit_config(folder)["max_text_seq_length"]
    PAD, EOS = 0, 1                                        # T5's ids

    @torch.no_grad()
    def encode_text(prompts):
        ids = [tokenizer.encode(prompt)[:length - 1] + [EOS] for prompt in prompts]
        ids = torch.tensor([row + [PAD] * (length - len(row)) for row in ids], device=device)
        return net(ids)                                                                 # (B,L,D)

    return encode_text

def load_vae(path, device="cpu", dtype=torch.float32):
    """Load the video autoencoder of a model folder or hub id. Raises UserError if it is missing or broken."""
    folder = resolve(path, "vae")
    config = read_config(folder, "vae", "AutoencoderKLCogVideoX")
    refuse(config, use_quant_conv=False, use_post_quant_conv=False, invert_scale_latents=False, shift_factor=None,
           norm_eps=1e-6)
    net = empty(VAE, config, dtype, device)
    fill(net.state_dict(), Stored(folder / "vae"))
    return net

def load_dit(path, device="cpu", dtype=torch.float32, shard=lambda net: None, compile=False, rank=0):
    """Load the diffusion transformer of a model folder, hub id, run or checkpoint as a `Denoiser`. `shard(net)` may
    distribute the still empty network; each rank then reads only its own rows of the files. Adapters are merged into
    their base. Raises UserError if it is missing, broken or of another kind.

    With a `rank`, the network gets adapters of that rank instead, those of `path` if it has some: returns the policy
    and the reference, two Denoisers that share it."""
    own = find_transformer(path)
    whole = find_transformer(base_of(path)) if own.base else own
    where = resolve(path, "transformer/config.json", "scheduler")
    config = read_dit_config(where)
    refuse(config, use_rotary_positional_embeddings=True, patch_size_t=None, ofs_embed_dim=None,
           in_channels=2 * config["out_channels"], activation_fn="gelu-approximate", timestep_activation_fn="silu",
           flip_sin_to_cos=True, freq_shift=0)
    scheduler = read_config(where, "scheduler",
                            "CogVideoXDDIMScheduler", "CogVideoXDPMScheduler", "FlowMatchEulerDiscreteScheduler")
    if scheduler["_class_name"] == "FlowMatchEulerDiscreteScheduler":
        prediction = FlowPrediction()
    else:
        refuse(scheduler, prediction_type="v_prediction", beta_schedule="scaled_linear", rescale_betas_zero_snr=True)
        prediction = VPrediction(scheduler)
    fingerprint = fingerprint_of_weights(whole.folder, whole.prefix) if own.base or rank else ""
    if own.base not in ("", "any", fingerprint):
        raise UserError(f"{path}: its adapters belong to another transformer than the one in {whole.folder}")

    def prepare(net):
        if rank:
            net.adapt(rank)
        if compile:
            net.compile_blocks()
        shard(net)

    net = empty(DiT, config, dtype, device, prepare)
    fill({name: tensor for name, tensor in net.state_dict().items() if ".adapters." not in name}, whole)
    if not rank:
        if own.base:
            merge(net, read_adapters(own), path)
        return Denoiser(net, prediction, scheduler)
    sides = [Denoiser(net, prediction, scheduler, side, fingerprint) for side in ("policy", "reference")]
    for denoiser in sides:
        begin_adapters(denoiser)
        if own.base:
            fill(dict(denoiser.named_parameters()), own)
    return sides

@torch.no_grad()
def begin_adapters(denoiser):
    """B begins as zero, A with random numbers, as in PEFT. Its name alone decides them: both sides get the same, on any
    number of ranks."""
    for name, tensor in denoiser.named_parameters():
        begin = torch.zeros(tensor.shape)
        if "lora_A" in name:
            limit = tensor.shape[1] ** -0.5
            begin.uniform_(-limit, limit, generator=generator("adapter", name))
        mine, first = own_rows(tensor)
        mine.copy_(begin[first:first + len(mine)])

@torch.no_grad()
def merge(net, adapters, path):
    """Add B·A to each W that has adapters, in fp32; where W is sharded, to the rows that this rank holds."""
    weights = net.state_dict()
    for name in adapters:
        if "lora_A" in name:
            weight = weights.get(name.replace("lora_A.weight", "weight"))
            b = adapters.get(name.replace("lora_A", "lora_B"))
            if weight is None or b is None:
                raise UserError(f"{path}: {name} belongs to no layer of this transformer")
            mine, first = own_rows(weight)
            mine.copy_(mine.float() + (b[first:first + len(mine)] @ adapters[name]).to(mine.device))

def save_dit(dit, path, dtype=None):
    """Write a denoiser's transformer/ and scheduler/ into the folder `path` or, of one with adapters, these alone, in
    fp32; diffusers opens both. `dtype` converts (training keeps fp32, publishing wants bf16). Every rank must call it;
    rank 0 then holds the whole network in CPU memory, 22 GB in fp32 at 5B, 11 GB more while it is converted."""
    tensors = dict(dit.own(gather(dit.net, ignore_frozen_params=bool(dit.side)).items()))
    if tensors and dit.side:
        save_adapters(tensors, Path(path) / ADAPTERS, dit.base)
    elif tensors:
        write_json(Path(path) / "scheduler" / "scheduler_config.json", dit.scheduler)
        save_part(tensors, dit.net.config, Path(path) / "transformer", dtype)
