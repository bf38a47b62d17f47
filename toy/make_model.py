"""The tiny model from nothing: a text encoder, a video autoencoder, and a base whose world was imperfect.

    python -m toy.make_model --out DIR     an hour on two cores; put DIR in the place of assets/tiny to use it
"""
import json, math
from dataclasses import dataclass
from pathlib import Path

from support.command import command, generator, option
from support.files import check_same, read_header, read_tensors, whole_file, write_tensors
from support.films import from_uint8
from support.folders import TINY
from support.weights import save_part
import numpy as np
import torch
import torch.nn as nn
from tqdm import tqdm

import model
from realdpo import Condition, sft_loss
from toy.world import ACTIONS, SPEEDS, toy_video, world_of

TINY_T5 = dict(architectures=["T5EncoderModel"], model_type="t5", vocab_size=64,
               d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
               relative_attention_num_buckets=32, relative_attention_max_distance=128,
               layer_norm_epsilon=1e-6, feed_forward_proj="gated-gelu")
TINY_VAE = dict(_class_name="AutoencoderKLCogVideoX", in_channels=3, out_channels=3,
                down_block_types=["CogVideoXDownBlock3D"] * 3, up_block_types=["CogVideoXUpBlock3D"] * 3,
                block_out_channels=[16, 16, 32], latent_channels=8, layers_per_block=1,
                norm_num_groups=4, norm_eps=1e-6, temporal_compression_ratio=4, sample_height=32, sample_width=32,
                act_fn="silu", scaling_factor=1.0)
TINY_DIT = dict(_class_name="CogVideoXTransformer3DModel", num_attention_heads=3, attention_head_dim=32,
                in_channels=16, out_channels=8, time_embed_dim=32, text_embed_dim=32, num_layers=5,
                sample_width=8, sample_height=8, sample_frames=17, patch_size=2, temporal_compression_ratio=4,
                max_text_seq_length=16, norm_eps=1e-5, activation_fn="gelu-approximate", timestep_activation_fn="silu",
                use_rotary_positional_embeddings=True, use_learned_positional_embeddings=True)
FLOW = dict(_class_name="FlowMatchEulerDiscreteScheduler", num_train_timesteps=1000, shift=1.0)

def cosine(step, steps, lr):
    """Learning rate with 50 steps of warm-up and a cosine down to a hundredth."""
    return lr * min(1, (step + 1) / 50) * (0.01 + 0.99 * (1 + math.cos(math.pi * step / steps)) / 2)

def orthogonal(x):
    """Matrices (N,r,c) with their singular values brought near 1, by five Newton-Schulz steps."""
    if x.shape[1] > x.shape[2]:
        return orthogonal(x.mT).mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x

@torch.no_grad()
def muon(weights, momenta, lr):
    """One step of Muon (Jordan 2024): matrices move along orthogonalised momentum, entries by about `lr`. It needs
    about a third of Adam's steps here; torch's own computes in bf16, which a CPU is slow at."""
    gradients = [w.grad for w in weights]
    torch._foreach_lerp_(momenta, gradients, 0.05)
    ahead = torch._foreach_lerp(gradients, momenta, 0.95)                               # Nesterov's
    for shape in {w.shape for w in weights}:
        same = [i for i, w in enumerate(weights) if w.shape == shape]                   # in one batch
        step = orthogonal(torch.stack([ahead[i] for i in same])) * max(shape) ** 0.5
        torch._foreach_add_([weights[i] for i in same], list(step), alpha=-lr)

class State:
    """Everything that an optimization changes: weights, Muon's momentum and Adam's moments, saved now and then."""

    def __init__(self, parameters, file, **made_by):
        self.file, self.made_by = file, made_by
        self.weights = list(parameters)
        self.matrices = [p for p in self.weights if p.ndim == 2]
        self.others = [p for p in self.weights if p.ndim != 2]
        self.momentum = [torch.zeros_like(p) for p in self.matrices]
        self.exp_avg = [torch.zeros_like(p) for p in self.others]
        self.exp_avg_sq = [torch.zeros_like(p) for p in self.others]

    def tensors(self):
        """{name: tensor} of everything."""
        named = {}
        for kind in ("weights", "momentum", "exp_avg", "exp_avg_sq"):
            for i, tensor in enumerate(getattr(self, kind)):
                named[f"{kind}.{i}"] = tensor.detach()
        return named

    def load(self):
        """Read the file, if there is one. Returns the steps done. Raises UserError if it was made with another seed or
        number of steps."""
        if not self.file.exists():
            return 0
        saved = read_header(self.file)[1]
        check_same(self.file, saved, self.made_by)
        named = self.tensors()
        for name, tensor in read_tensors(self.file).items():
            named[name].copy_(tensor)
        return saved["step"]

    def save(self, step):
        """Write the file."""
        write_tensors(self.file, self.tensors(), step=step, **self.made_by)

def optimize(parameters, loss, steps, lr, file, seed=0, save_every=500):
    """Muon for matrices and Adam for all else, on `loss(generator)`, with a progress bar; its state goes to `file` now
    and then, from which it continues."""
    torch.set_flush_denormal(True)                         # else Adam's moments of idle weights slow a CPU down
    state = State(parameters, file, steps=steps, seed=seed)
    first = state.load()
    adam = torch.optim.AdamW(state.others, lr, betas=(0.9, 0.99), weight_decay=0.0)
    for p, exp_avg, exp_avg_sq in zip(state.others, state.exp_avg, state.exp_avg_sq):
        adam.state[p] = dict(step=torch.tensor(float(first)), exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    average = None
    bar = tqdm(range(first, steps), initial=first, total=steps, desc=file.stem)
    for step in bar:
        value = loss(generator(file.stem, seed, step))
        for p in state.weights:
            p.grad = None
        value.backward()
        nn.utils.clip_grad_norm_(state.others, 1.0)
        rate = cosine(step, steps, lr)
        adam.param_groups[0]["lr"] = rate
        adam.step()
        muon(state.matrices, state.momentum, rate)
        average = value.item() if average is None else 0.99 * average + 0.01 * value.item()
        bar.set_postfix(loss=f"{average:.4f}")
        if (step + 1) % save_every == 0:
            state.save(step + 1)

def make_text_encoder(folder):
    """A SentencePiece vocabulary of the toy captions and a random T5, frozen: it only has to tell captions apart."""
    import sentencepiece
    words = {"a", "figure", *SPEEDS}
    rng = np.random.default_rng(0)
    for action in ACTIONS:
        words.update(action.split())
    words = sorted(words)
    sentences = (" ".join(rng.choice(words, 6)) for _ in range(1000))       # shuffled, so that the pieces are the words
    with whole_file(folder / "tokenizer" / "spiece.model") as part, open(part, "wb") as f:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences, model_writer=f, model_type="unigram", vocab_size=TINY_T5["vocab_size"],
            pad_id=0, eos_id=1, unk_id=2, bos_id=-1, hard_vocab_limit=False, minloglevel=2)
    torch.manual_seed(0)
    save_part(model.T5Encoder(TINY_T5).state_dict(), TINY_T5, folder / "text_encoder", torch.bfloat16, stem="model")

FAULTS = (0.4, 1.0)                        # least and greatest strength of the faults in the corpus
CLEAN = (0.0, 0.0)

def corpus_clip(index, faults, seed=0):
    """Clip `index` of the corpus the base learns from. Each has faults, of a strength of its own between those two."""
    strength = float(np.random.default_rng([seed, index, 3]).uniform(*faults))
    return toy_video(world_of(seed, "corpus"), index, strength=strength)

def make_vae(folder, steps):
    """A small CogVideoX autoencoder, trained on clean and imperfect figures alike."""
    torch.manual_seed(0)
    vae = model.VAE(TINY_VAE)
    config = dict(TINY_VAE)
    clips = []
    for i in tqdm(range(2048), desc="drawing figures"):
        frames, _ = corpus_clip(i, FAULTS if i % 2 else CLEAN)
        clips.append(from_uint8(frames))
    clips = torch.stack(clips)

    def reconstruct(video, noise):
        mean, std = vae.posterior(video)
        past = {}
        z = mean + std * noise(mean)
        video = torch.cat([vae.decoder(z[:, :, chunk], past) for chunk in model.chunks(z.shape[2], 2)], dim=2)
        return video, mean, std

    def loss(rng):
        video = clips[torch.randint(len(clips), (4,), generator=rng)]
        output, mean, std = reconstruct(video, lambda z: torch.randn(z.shape, generator=rng))
        kl = (mean ** 2 + std ** 2 - 1 - 2 * std.log()).mean() / 2
        return (output - video).abs().mean() + (output - video).square().mean() + 1e-4 * kl

    optimize(vae.parameters(), loss, steps, 3e-3, folder / "autoencoder.safetensors")
    with torch.no_grad():
        held_out = torch.stack([from_uint8(toy_video(world_of(0, "held-out"), i)[0]) for i in range(32)])
        output, mean, _ = reconstruct(held_out, torch.zeros_like)
    config["scaling_factor"] = round(1 / mean.std().item(), 6)
    error = (output.clamp(-1, 1) - held_out).square().mean().item() / 4
    print(f"autoencoder: {-10 * math.log10(error):.1f} dB on 32 held-out clips")
    save_part(vae.state_dict(), config, folder / "vae", torch.bfloat16)

def make_base(folder, steps, seed=0, clips=4096, unseen=128):
    """Pre-train the transformer by flow matching on a corpus of imperfect figures, as the web is of videos, around the
    text encoder and autoencoder in `folder`. Prints the loss on `unseen` clips more: compared with that of another
    number of steps, it tells how far from converged the base is."""
    (folder / "transformer").mkdir(exist_ok=True)          # the text encoder asks it for the length of a caption
    (folder / "transformer" / "config.json").write_text(json.dumps(TINY_DIT))
    vae, encode_text = model.load_vae(folder), model.load_text_encoder(folder)
    empty = encode_text([""])[0]
    samples = []
    for first in tqdm(range(0, clips + unseen, 16), desc="encoding the corpus"):
        drawn = [corpus_clip(first + i, FAULTS, seed) for i in range(16)]
        rng = generator("corpus", seed, first)
        video = torch.stack([from_uint8(frames) for frames, _ in drawn])
        samples.append((vae.encode(video, rng), vae.encode(video[:, :, :1], rng), encode_text([c for _, c in drawn])))
    win, image, text = (torch.cat(x) for x in zip(*samples))
    torch.manual_seed(seed)
    net = model.DiT(TINY_DIT)
    # Every block starts as the identity (DiT's adaLN-Zero).
    zero = [net.norm_out.linear, net.proj_out]
    for block in net.transformer_blocks:
        zero += [block.norm1.linear, block.norm2.linear]
    for linear in zero:
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    # The table of positions is a buffer in the published model, but here it has to be trained.
    table = nn.init.normal_(net.patch_embed.pos_embedding, std=0.02).requires_grad_()
    denoiser = model.Denoiser(net, model.FlowPrediction(), FLOW)

    def loss(rng, i=None):
        i = torch.randint(clips, (16,), generator=rng) if i is None else i
        captioned = torch.rand(len(i), 1, 1, generator=rng) > 0.1               # some without a caption, for guidance
        cond = Condition(torch.where(captioned, text[i], empty), image[i])
        return sft_loss(denoiser, win=win[i], cond=cond, t=1 - torch.rand(len(i), generator=rng),
                        noise=torch.randn(win[i].shape, generator=rng), weighting="velocity")[0]

    optimize([*net.parameters(), table], loss, steps, 2e-3, folder / "base.safetensors", seed)
    model.save_dit(denoiser, folder, torch.bfloat16)
    with torch.no_grad():
        print(f"base: loss {loss(generator('unseen'), torch.arange(clips, len(win))):.4f} on clips it has not seen")

BASE_STEPS = 6000
DEFAULTS = json.loads((TINY / "defaults.json").read_text())            # of the commands' options, for this model

@dataclass
class Options:
    """Make the tiny model, part by part; a part that is there already is kept."""
    out: str = option("tiny", "folder for the model")
    steps: int = option(BASE_STEPS, "of the transformer's pre-training")
    seed: int = option(0, "of the transformer and of its corpus")

def main(options):
    """Make what is missing of the model in --out."""
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "text_encoder").is_dir():
        make_text_encoder(folder)
    if not (folder / "vae").is_dir():
        make_vae(folder, 3500)
    make_base(folder, options.steps, options.seed)
    (folder / "defaults.json").write_text(json.dumps(DEFAULTS, indent=2) + "\n")
    print(f"the tiny model is in {folder}; put it in the place of {TINY} to use it as --model tiny")

if __name__ == "__main__":
    command(main, Options, "toy.make_model")
