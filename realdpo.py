"""RealDPO: real videos against the model's own (paper: "RealDPO: Real or Not Real, that is the Preference").

The whole method, as functions of tensors. A *denoiser* is any callable D(x_t, cond, t) -> x̂₀; which network is inside,
and what that network predicts, is model.py's business. The four steps of a training run are

    lose      = sample(policy, noise, cond, ...)               three for each real video, offline           Sec. 4.2
    loss, _   = realdpo_loss(policy, reference, win=..., lose=lose, cond=cond, beta=..., t=..., noise=...)  Eq. 6
    loss.backward(); optimizer.step()
    ema_update(reference, policy, 0.996)                       every step, or every few                     Eq. 7

Symbols, as in the paper and in every file here:

    x₀ (B,C,F,H,W) clean latents    ε noise    t ∈ (0,1] noise level (B,)    x_t = (1−t)·x₀ + t·ε    x̂₀ = D(x_t, c, t)
    win   latents of a real video (B,C,F,H,W)       lose   latents of N generated ones (B,N,C,F,H,W)
    B batch, N negatives, C channels, F H W latent frames, height and width, L text tokens, D text width
"""
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as nnf
from einops import rearrange, repeat
from torch.distributed.tensor import DTensor
from tqdm import tqdm

class Condition(NamedTuple):
    """What a video is generated from: the caption and the first frame. Unconditional: the caption ""."""
    text: torch.Tensor                                     # (B,L,D)
    image: torch.Tensor                                    # (B,C,1,H,W), latents of the first frame encoded alone

    def repeat(self, n):
        """The same condition for n videos a sample: (B,…) -> (B·n,…)."""
        return Condition(repeat(self.text, "b ... -> (b n) ...", n=n), repeat(self.image, "b ... -> (b n) ...", n=n))


# ---- Noise and errors (App. C) --------------------------------------------------------------------------------------

def add_noise(x0, noise, t):
    """x_t = (1 − t)·x₀ + t·ε, in fp32. x0 and noise (B,…), t (B,)."""
    t = t.float().view(-1, *[1] * (x0.ndim - 1))
    return (1 - t) * x0.float() + t * noise.float()

def denoising_errors(denoiser, videos, noise, t, cond, weighting):
    """ℓ(x₀) = w(t) · the mean over elements of (x₀ − D(x_t, c, t))², fp32 (B,K), of K videos a sample (B,K,C,F,H,W),
    all at the sample's one t (B,) and ε (B,C,F,H,W).

    weighting "x0" (w = 1) is the paper's App. C; "velocity" (w = 1/t²) is the squared error of the flow velocity
    ε − x₀, the same as the authors' 1/(1−ᾱ) up to (1−t)² + t². Raises ValueError for any other.
    """
    if weighting not in ("x0", "velocity"):
        raise ValueError(f'weighting is "{weighting}", expected "x0" or "velocity"')
    k = videos.shape[1]
    x0 = rearrange(videos, "b k ... -> (b k) ...").float()
    noise = repeat(noise, "b ... -> (b k) ...", k=k)
    t = t.float().repeat_interleave(k)
    difference = denoiser(add_noise(x0, noise, t), cond.repeat(k), t).float() - x0
    errors = difference.square().flatten(1).mean(1)
    if weighting == "velocity":
        errors = errors / t ** 2
    return rearrange(errors, "(b k) -> b k", k=k)


# ---- The losses -----------------------------------------------------------------------------------------------------

def win_and_lose(win, lose):
    """Win (B,C,F,H,W) and lose (B,N,C,F,H,W) in one tensor (B,1+N,C,F,H,W), fp32. Raises ValueError for others."""
    if lose.ndim != win.ndim + 1 or lose.shape[:1] + lose.shape[2:] != win.shape:
        raise ValueError(f"win {tuple(win.shape)} and lose {tuple(lose.shape)}; expected (B,C,F,H,W) and (B,N,C,F,H,W)")
    return torch.cat([win[:, None].float(), lose.float()], dim=1)

def preference_loss(win, lose, ref_win, ref_lose, beta, anchor=0.0, scale=1.0):
    """Eq. 6 of denoising errors: the policy's `win` (B,1) and `lose` (B,N), the reference's likewise.
    Returns (loss, metrics) as `realdpo_loss` does."""
    z = -beta / 2 * ((win - ref_win) - (lose - ref_lose))                               # (B,N), Eq. 6
    preference = -nnf.logsigmoid(z).mean()
    loss = scale * preference + anchor * win.mean()
    metrics = dict(preference=preference, win=win, lose=lose, ref_win=ref_win, ref_lose=ref_lose,
                   margin=z, accuracy=(z > 0).float())
    return loss, {name: value.detach().mean() for name, value in metrics.items()}

def realdpo_loss(policy, reference, *, win, lose, cond, beta, t, noise, weighting="x0", anchor=0.0, scale=1.0):
    """The RealDPO loss (Eq. 6, App. C), averaged over samples and negatives.

        z = −β/2 · [ (ℓ_θ(win) − ℓ_ref(win)) − (ℓ_θ(lose) − ℓ_ref(lose)) ]        L = −log σ(z)

    win (B,C,F,H,W), lose (B,N,C,F,H,W), t (B,), noise (B,C,F,H,W): one t and one ε a sample, shared by the win and its
    negatives. The same noise is equally hard for both, so its difficulty cancels in the difference. ℓ is a mean over
    elements, so that β does not depend on the latents' size: the authors' 5000 is 5000 / numel = 0.00445 on a sum.
    `anchor` adds anchor · ℓ_θ(win), the supervised loss (the paper has none). `scale` multiplies L alone: it is k where
    only every k-th step compares.

    Where z comes from: DPO (Eq. 2) asks for −log σ(β·[log p_θ/p_ref (win) − log p_θ/p_ref (lose)]), but a diffusion
    model does not know log p(x₀). It makes a video in T steps, each a draw from a Gaussian around what it expects, and
    the log-density of a Gaussian is −½·(distance)² over its variance. So log p_θ/p_ref becomes a sum over T noise
    levels of −½·(‖x₀ − x̂₀‖²_θ − ‖x₀ − x̂₀‖²_ref) over the variance. By Jensen's inequality one random level stands for
    all: T times its term, whose weight is the ω(λ_t) of Eq. 3 and 6. Appendix C has ½ instead of T·ω(λ_t): β takes in
    T, ω is constant, and the Gaussian's ½ is left. `weighting` chooses another ω.

    Returns (loss, metrics): scalars `preference` (L, log 2 while policy and reference agree), `win`, `lose`, `ref_win`,
    `ref_lose` (the four errors), `margin` (mean z) and `accuracy` (how often z > 0: the policy prefers the real video
    more than the reference does).
    """
    videos = win_and_lose(win, lose)
    sizes = [1, lose.shape[1]]                             # the win once, for all its negatives
    win_error, lose_error = denoising_errors(policy, videos, noise, t, cond, weighting).split(sizes, dim=1)
    with torch.no_grad():
        ref_win, ref_lose = denoising_errors(reference, videos, noise, t, cond, weighting).split(sizes, dim=1)
    return preference_loss(win_error, lose_error, ref_win, ref_lose, beta, anchor, scale)

def streamed_realdpo_loss(policy, reference, *, win, lose, cond, beta, t, noise, weighting="x0", anchor=0.0, scale=1.0,
                          graphs="two"):
    """`realdpo_loss` with less memory: the same numbers and gradients, a video at a time.

    The backward passes of the negatives run inside; that of the returned loss, called as usual, is the win's. A pair's
    loss depends on the win through one number per sample, its error. A stand-in takes the place of that number and
    collects its gradient from all negatives. With graphs "two", the win's graph is kept meanwhile, beside that of one
    negative. With "one", the win's error is first computed without a graph, and again at the end: one more forward.
    """
    videos = win_and_lose(win, lose)
    errors = partial(denoising_errors, noise=noise, t=t, cond=cond, weighting=weighting)
    first, *others = videos.split(1, dim=1)
    with torch.no_grad():      # the same batch shapes as the policy's, so that equal weights give bit-equal errors
        ref_win, *ref_lose = [errors(reference, video) for video in [first, *others]]
    with torch.set_grad_enabled(graphs == "two"):
        win_error = errors(policy, first)
    stand_in = win_error.detach().requires_grad_()
    lose_errors = []
    for video, ref in zip(others, ref_lose):
        lose_error = errors(policy, video)
        loss, _ = preference_loss(stand_in, lose_error, ref_win, ref, beta, anchor, scale)
        (loss / len(others)).backward()                    # frees this negative's graph
        lose_errors.append(lose_error.detach())
    if graphs == "one":
        win_error = errors(policy, first)
    rest = (win_error * stand_in.grad).sum()               # its gradient is the part of the loss's that is left
    loss, metrics = preference_loss(win_error.detach(), torch.cat(lose_errors, 1), ref_win, torch.cat(ref_lose, 1),
                                    beta, anchor, scale)
    return loss + (rest - rest.detach()), metrics          # the value of loss, the gradient of rest

def sft_loss(policy, *, win, cond, t, noise, weighting="x0"):
    """Supervised fine-tuning, the paper's baseline: the mean error on real videos, in (loss, metrics) as `win`."""
    loss = denoising_errors(policy, win[:, None], noise, t, cond, weighting).mean()
    return loss, {"win": loss.detach()}

def best_and_worst(videos, scores):
    """(win, lose (B,1,C,F,H,W)) for `realdpo_loss` from generated videos alone (B,N,C,F,H,W), by scores (B,N): a reward
    model instead of real videos, as in VideoAlign (Eq. 3, but one noise for both where Eq. 3 has two)."""
    rows = torch.arange(len(videos), device=videos.device)
    return videos[rows, scores.argmax(1)], videos[rows, scores.argmin(1)][:, None]

def rwr_loss(policy, *, videos, scores, cond, t, noise, temperature=1.0, weighting="x0"):
    """Reward-weighted regression, in the manner of LiFT: the error on generated videos (B,N,C,F,H,W), each weighted by
    softmax(score / temperature) of its sample's scores (B,N). Returns (loss, metrics) with the weighted error as `win`.
    """
    share = (scores.float() / temperature).softmax(1)                                   # (B,N)
    loss = (share * denoising_errors(policy, videos, noise, t, cond, weighting)).sum(1).mean()
    return loss, {"win": loss.detach()}

def local(tensors):
    """What this process holds of each tensor: all of it or, under FSDP, its shard."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]

@torch.no_grad()
def ema_update(reference, policy, decay):
    """θ_ref ← ω·θ_ref + (1 − ω)·θ, ω = `decay` (Eq. 7). Keep the reference in fp32: bf16 rounds most of it away.

    Works on FSDP's shards, without communication. If FSDP's root kept its parameters gathered, it would go on using the
    old values: shard it with reshard_after_forward=True.
    """
    old, new = local(reference.parameters()), local(policy.parameters())
    torch._foreach_lerp_(old, [p.to(r.dtype) for r, p in zip(old, new, strict=True)], 1 - decay)


# ---- The sampler ----------------------------------------------------------------------------------------------------

@torch.no_grad()
def sample(denoiser, noise, cond, *, steps, guidance, uncond=None, solver="euler", progress=True):
    """Generate latents (B,C,F,H,W) from noise of that shape, in `steps` evaluations of the denoiser.

    solver "euler": x ← x + (t′ − t)·v with v = (x − x̂₀)/t, one step along the flow; on CogVideoX's time grid that is
    one DDIM step. "multistep": v is extrapolated from the last two, and each step is corrected once v at its end is
    known (Adams' second-order predictor and corrector): at least as near to the exact path in half the evaluations.
    guidance g > 1: x̂₀ = x̂₀(∅) + g·(x̂₀(c) − x̂₀(∅)), in one batch; `uncond` is the text of "", (L,D) or (B,L,D).
    """
    if solver not in ("euler", "multistep"):
        raise ValueError(f'solver is "{solver}", expected "euler" or "multistep"')
    if guidance != 1 and uncond is None:
        raise ValueError(f"guidance {guidance} needs uncond, the text of the empty caption")
    if guidance != 1:
        both = Condition(torch.cat([uncond.expand_as(cond.text), cond.text]), torch.cat([cond.image, cond.image]))

    def denoise(x, t):
        if guidance == 1:
            return denoiser(x, cond, t.expand(len(x)))
        without, with_caption = denoiser(torch.cat([x, x]), both, t.expand(2 * len(x))).chunk(2)
        return without + guidance * (with_caption - without)

    x = noise.float()
    passed = None                                          # the point before: (x, v, t)
    times = denoiser.time_grid(steps).to(noise.device)
    for t, t_next in tqdm(list(zip(times, times[1:])), desc="sampling", disable=not progress, leave=False):
        v = (x - denoise(x, t)) / t
        slope = v
        if solver == "multistep" and passed:
            x_before, v_before, t_before = passed
            x = x_before + (t - t_before) * (v_before + v) / 2         # that step again, now that v at its end is known
            slope = v + (t_next - t) / (t - t_before) / 2 * (v - v_before)
        passed = x, v, t
        x = x + (t_next - t) * slope
    return x
