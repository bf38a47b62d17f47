"""RealDPO, the training run: one code path for a laptop, two CPU processes and eight GPUs.

    python train.py                                                    laptop: everything, on the tiny model, in minutes
    python train.py --model MODEL --data CACHE --out RUN               one GPU
    torchrun --nproc_per_node 8 train.py                               CogVideoX-5B-I2V on the records in cache/

RUN afterwards holds transformer/ (opens here, --model RUN, and in diffusers), metrics.jsonl, curves.svg, checkpoints/.
The same command continues an interrupted run from its last checkpoint.
"""
import dataclasses, json, math, os, shutil, signal, threading, time, warnings
from collections import Counter
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn as nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from tqdm import tqdm

import data, model, sample
from data import Records, command, flag, generator, placement, whole_file
from model import UserError
from realdpo import Condition, best_and_worst, ema_update, realdpo_loss, rwr_loss, sft_loss


@dataclass
class Options:
    """Align an image-to-video transformer with real videos."""
    model: str = ""                    # model folder, hub id, training run or "tiny"; default: by whether a GPU is here
    data: str = "cache"                # cache of records, from data.py and sample.py
    out: str = "run"                   # folder for the trained transformer, checkpoints and logs
    method: Literal["realdpo", "sft", "dpo", "rwr"] = "realdpo"  # or sft on the real videos; dpo, rwr: scored generated
    temperature: float = 1.0           # of rwr: scores so far apart weigh e times as much
    epochs: int = 0                    # passes over the records, in place of --steps; default: 10 (paper)
    steps: int = 0                     # training steps; default: what the epochs come to
    batch: int = 8                     # samples a step over all GPUs (paper: 8); a sample is one win and N lose videos
    micro_batch: int = 1               # samples a GPU takes at a time; the rest of its share is accumulated
    lr: float = 1e-5                   # learning rate after warm-up (paper: 1e-5)
    warmup: int = 20                   # steps of linear warm-up
    weight_decay: float = 1e-4         # of AdamW
    clip: float = 1.0                  # largest gradient norm
    beta: float = 5000.0               # strength of the preference, on the mean error an element (authors' code: 5000)
    weighting: Literal["x0", "velocity"] = "x0"  # of the error over t: x0 (App. C) or velocity, 1/t²
    anchor: float = 0.0                # weight of the win error added to the loss (paper: none)
    t_min: float = 0.0                 # smallest t; t is uniform up to t_max (paper: 0 to 1)
    t_max: float = 1.0                 # largest t (authors' code: 0.6387, the low-noise half)
    ema_decay: float = 0.996           # ω of the reference (Eq. 7, paper: 0.996)
    ema_every: int = 1                 # steps between two updates of the reference (paper: unnamed)
    checkpointing: Literal["none", "full", "selective"] = "selective"  # recompute blocks, selective: all but attention
    stream: bool = True                # back-propagate a sample's videos one by one: less memory, same gradient
    save_every: int = 200              # steps between checkpoints
    keep: int = 2                      # checkpoints to keep
    resume: str = "auto"               # auto (go on with --out's run), none (refuse one) or a checkpoint to start from
    max_minutes: float = 0.0           # stop with a checkpoint after this long; 0: never
    eval_data: str = ""                # cache of held-out records with negatives
    eval_every: int = 50               # steps between two looks at the eval_data
    eval_videos: int = 0               # held-out records to generate as mp4 each time
    compile: bool = False              # torch.compile each block, policy and reference alike
    seed: int = 0                      # of order, noise and t
    dry_run: bool = False              # only compute what a run would take: memory, FLOP, hours; needs no GPU
    gpus: int = 8                      # ranks of the dry run
    judge: str = ""                    # only measure a folder of mp4s of the laptop run's held-out figures
    experiment: int = 0                # bases of the README's table to make and compare, into --out (hours)
    from_scratch: bool = False         # make the tiny model itself again (an hour), into --out
    base_steps: int = 6000             # of pre-training, in --experiment and --from-scratch


TINY = dict(steps=100, micro_batch=8, lr=3e-4, beta=500.0, anchor=100.0, checkpointing="none", stream=False,
            save_every=50)
PREFERENCE = ("realdpo", "dpo")         # the methods that compare with a reference
SCORED = ("dpo", "rwr")                 # the methods that learn from scored generated videos, not from real ones
CHECKPOINTING = {"none": False, "full": True, "selective": "selective"}


# ---------------------------------------------------------------------------------------------------------------------
# Processes and sharding: the networks know nothing of it
# ---------------------------------------------------------------------------------------------------------------------

def start():
    """Join the process group; a bare `python` is a group of one, so nothing below asks whether there are others.

    Returns this process's Place and the mesh of all.
    """
    place = placement()
    cuda = place.device.type == "cuda"
    if "RANK" in os.environ:
        dist.init_process_group("cuda:nccl,cpu:gloo" if cuda else "gloo")
    else:
        dist.init_process_group("nccl" if cuda else "gloo", store=dist.HashStore(), rank=0, world_size=1)
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")         # on purpose, see `alone`
    return place, init_device_mesh(place.device.type, (place.world,), mesh_dim_names=("dp",))


def shard(net, mesh, dtype, compile=False):
    """Split every block's parameters over the ranks (FSDP2), gathered in `dtype`, gradients reduced in fp32."""
    precision = dict(param_dtype=dtype, reduce_dtype=torch.float32)
    if compile:
        net.compile_blocks()
    for block in net.transformer_blocks:
        fully_shard(block, mesh=mesh,
                    mp_policy=MixedPrecisionPolicy(**precision, cast_forward_inputs=False))    # rope stays fp32
    # Resharding the root too: else its parameters stay gathered after a forward and hide the EMA's updates.
    fully_shard(net, mesh=mesh, mp_policy=MixedPrecisionPolicy(**precision, output_dtype=torch.float32),
                reshard_after_forward=True)


def load_models(options, place, mesh):
    """Policy and reference, equal and sharded, fp32; they compute in the place's dtype."""
    policy, reference = (model.load_dit(options.model, place.device, torch.float32,
                                        lambda net: shard(net, mesh, place.dtype, options.compile)) for _ in range(2))
    policy.checkpointing = CHECKPOINTING[options.checkpointing]
    return policy.train(), reference.requires_grad_(False)


def make_optimizer(policy, options):
    """AdamW whose moments exist from the start, so that a checkpoint can be read into them."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=options.lr, betas=(0.9, 0.95),
                                  weight_decay=options.weight_decay, fused=True)
    for p in policy.parameters():
        optimizer.state[p] = dict(step=torch.zeros((), device=p.device),
                                  exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
    return optimizer


# ---------------------------------------------------------------------------------------------------------------------
# One step
# ---------------------------------------------------------------------------------------------------------------------

def number_of_steps(options, count):
    """What --epochs over `count` records come to; else --steps; else what the paper's ten epochs come to."""
    if options.steps and not options.epochs:
        return options.steps
    return math.ceil((options.epochs or 10) * count / options.batch)


def order(options, count, step):
    """Indices of the records of one global batch: a fresh permutation each epoch, a function of (seed, step) alone."""
    picks = range(step * options.batch, (step + 1) * options.batch)
    epochs = {pick // count: None for pick in picks}
    shuffled = {epoch: torch.randperm(count, generator=generator("order", options.seed, epoch)) for epoch in epochs}
    return [int(shuffled[pick // count][pick % count]) for pick in picks]


def collate(records, samples, options, step, device):
    """Tensors of a micro-batch of (place in the global batch, record): win, lose, cond, and each sample's own t and
    noise, which depend on seed, step and place alone."""
    rows = []
    for place, index in samples:
        row, rng = records[index], generator("train", options.seed, step, place)
        row["t"] = options.t_min + (options.t_max - options.t_min) * (1 - torch.rand((), generator=rng))
        row["noise"] = torch.randn(row["win"].shape, generator=rng)
        if "noised" in row:
            row["image"] = row["noised"][torch.randint(len(row["noised"]), (), generator=rng)]
        rows.append(row)
    batch = {k: torch.stack([row[k] for row in rows]).to(device) for k in rows[0] if k != "noised"}
    batch["cond"] = Condition(batch.pop("text").float(), batch.pop("image").float())
    return batch


def loss_of(policy, reference, batch, options):
    """Loss and metrics of a micro-batch by the chosen method."""
    win, lose = batch["win"].float(), batch["lose"].float() if "lose" in batch else None
    common = dict(cond=batch["cond"], t=batch["t"], noise=batch["noise"], weighting=options.weighting)
    if options.method == "sft":
        return sft_loss(policy, win=win, **common)
    if options.method == "rwr":
        return rwr_loss(policy, videos=lose, scores=batch["scores"], temperature=options.temperature, **common)
    if options.method == "dpo":
        win, lose = best_and_worst(lose, batch["scores"])
    return realdpo_loss(policy, reference, win=win, lose=lose, beta=options.beta, anchor=options.anchor,
                        stream=options.stream, **common)


stop = threading.Event()                                   # set when this process shall finish its step, save and leave


@contextmanager
def finish_on_signals():
    """SIGTERM (clusters pre-empt, launchers repeat it) and Ctrl-C end the run after its step; Ctrl-C twice, at once."""
    def handle(number, _):
        stop.set()
        if number == signal.SIGINT:
            signal.signal(number, before[number])

    stop.clear()
    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def checkpoints(options):
    """The whole checkpoints under --out, oldest first."""
    return sorted((Path(options.out) / "checkpoints").glob("step-??????"))


def check_health(metrics, options, step, names, dtype):
    """Stop before the optimizer spoils the weights: where a number is not finite, or the first loss is not log 2."""
    bad = [key for key, value in metrics.items() if not math.isfinite(value)]
    if bad:
        raise UserError(f"step {step}: {', '.join(bad)} not finite, records {' '.join(names)}; nothing was updated; "
                        f"the last good checkpoint is {(checkpoints(options) or ['none'])[-1]}: "
                        "start from it with --resume, a lower --lr or --beta and another --out")
    # In bf16, or compiled, a kernel's last bits may differ with and without gradients; β makes that visible.
    rounding = 1e-2 if options.compile or dtype == torch.bfloat16 else 1e-6
    if options.method in PREFERENCE and step == 0 and abs(metrics["preference"] - math.log(2)) > rounding:
        raise UserError(f"the first preference loss is {metrics['preference']:.8f}, "
                        f"expected log 2 = {math.log(2):.8f}: the reference is not the policy")


def train_step(policy, reference, optimizer, records, options, step, place):
    """One optimizer step. Returns the metrics, averaged over all ranks, and whether some rank was asked to stop."""
    samples = list(enumerate(order(options, len(records), step)))
    mine = samples[place.rank::place.world]
    parts = [mine[i:i + options.micro_batch] for i in range(0, len(mine), options.micro_batch)]
    total = {}
    for part in parts:                                     # equal parts, so the mean of their gradients is the batch's
        loss, metrics = loss_of(policy, reference, collate(records, part, options, step, place.device), options)
        if loss.requires_grad:                             # else it was streamed, and is back-propagated already
            loss.backward()
        for key, value in {"loss": loss.detach(), **metrics}.items():
            total[key] = total.get(key, 0) + value.double() / len(parts)
    numbers = torch.stack([*total.values(),
                           torch.tensor(float(stop.is_set()), dtype=torch.float64, device=place.device)]) / place.world
    dist.all_reduce(numbers)
    *values, asked = numbers.tolist()
    metrics = dict(zip(total, values))
    torch._foreach_div_([p.grad.to_local() for p in policy.parameters()], len(parts))
    metrics["grad_norm"] = nn.utils.clip_grad_norm_(policy.parameters(), options.clip).full_tensor().item()
    check_health(metrics, options, step, [records.names[index] for _, index in samples], place.dtype)
    for group in optimizer.param_groups:
        group["lr"] = metrics["lr"] = options.lr * min(1, (step + 1) / max(1, options.warmup))
    optimizer.step()
    optimizer.zero_grad()
    if options.method in PREFERENCE and (step + 1) % options.ema_every == 0:
        ema_update(reference, policy, options.ema_decay)                                # shard by shard: no traffic
    return metrics, asked > 0


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: tensors only, in safetensors; a folder has its name only once it is whole
# ---------------------------------------------------------------------------------------------------------------------

def training_state(policy, reference, optimizer):
    """Everything that training changes, as one flat dict of (sharded) tensors."""
    state = {}
    for name, p in policy.net.named_parameters():
        state[f"model.{name}"] = p.detach()
        state |= {f"{moment}.{name}": optimizer.state[p][moment] for moment in ("exp_avg", "exp_avg_sq")}
    return state | {f"ref.{name}": p.detach() for name, p in reference.net.named_parameters()}


def alone():
    """Whether there is one process: its checkpoints then go around the process group, whose CPU backend would leave
    threads behind that make every later step on a CPU half as slow again (OpenMP sees more threads than cores)."""
    return dist.get_world_size() == 1


def save_checkpoint(state, options, step, rank):
    """Write checkpoints/step-N, then forget all but the last `keep`."""
    folder = Path(options.out) / "checkpoints"
    part, final = folder / f"step-{step:06d}.part", folder / f"step-{step:06d}"
    try:
        if rank == 0:
            for left in (*folder.glob("step-*.part"), *folder.glob("step-*.old")):   # by runs that were killed in here
                shutil.rmtree(left, ignore_errors=True)
            part.mkdir(parents=True)
            (part / "options.json").write_text(json.dumps({"step": step, **dataclasses.asdict(options)}, indent=1))
        dist.barrier()
        files = {name: 1 + i // 200 for i, name in enumerate(state)}     # a file is in CPU memory thrice as it is made
        dcp.save(state, storage_writer=dcp.HuggingFaceStorageWriter(str(part), files, save_distributed=True),
                 no_dist=alone())
    except (OSError, dcp.api.CheckpointException) as e:
        shutil.rmtree(part, ignore_errors=True)
        reason = list(e.failures.values())[0][0] if isinstance(e, dcp.api.CheckpointException) else e
        raise UserError(f"{part}: cannot be written ({reason}); "
                        "earlier checkpoints are whole: make room and start again") from None
    if rank == 0:
        model.replace_folder(part, final)
        for old in checkpoints(options)[:-options.keep]:
            shutil.rmtree(old, ignore_errors=True)         # in use by another: the next save tries again
    dist.barrier()


def load_checkpoint(state, optimizer, folder, options):
    """Read a checkpoint into the models and the optimizer. Returns its step.

    Raises UserError where it is not whole, or is of this --out and was made with options that make it another run.
    """
    try:
        saved = {"step": None, **json.loads((folder / "options.json").read_text())}
    except (OSError, ValueError, TypeError) as e:
        raise UserError(f"{folder / 'options.json'}: cannot be read ({e}); "
                        f"delete {folder} to continue from an earlier one") from e
    free = {"out", "steps", "epochs", "save_every", "keep", "resume", "max_minutes", "checkpointing",
            "stream", "micro_batch", "compile", "eval_data", "eval_every", "eval_videos", "dry_run", "gpus"}
    different = [f"{flag(k)} {saved.get(k)} (now {v})" for k, v in dataclasses.asdict(options).items()
                 if k not in free and saved.get(k) != v]
    if different and folder.parent == Path(options.out) / "checkpoints":
        raise UserError(f"{folder}: was made with {', '.join(different)}; use the same options or another --out")
    numbers = Counter()                                    # each rank's file has its part of each tensor
    for file in folder.glob("*.safetensors"):
        numbers.update({name: math.prod(shape) for name, shape in data.read_header(file)[0].items()})
    wrong = [name for name in {*numbers, *state} if name not in state or numbers[name] != state[name].numel()]
    if wrong:
        raise UserError(f"{folder}: not a whole checkpoint of this model (tensor {min(wrong)}); "
                        "delete it to continue from an earlier one")
    try:
        dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=alone())
    except dcp.api.CheckpointException as e:
        raise UserError(f"{folder}: not a whole checkpoint ({list(e.failures.values())[0][0]!r}); "
                        "delete it to continue from an earlier one") from None
    for s in optimizer.state.values():
        s["step"].fill_(saved["step"])
    return saved["step"]


def find_checkpoint(options):
    """The checkpoint to go on from: the last of --out, else the one that --resume names, else None, a fresh start."""
    found = checkpoints(options)
    if found and options.resume == "none":
        raise UserError(f"--out {options.out}: holds a run ({found[-1].name}); "
                        "choose another folder or leave out --resume none")
    if found or options.resume in ("auto", "none"):
        return found[-1] if found else None
    if not (Path(options.resume) / "options.json").is_file():
        raise UserError(f"--resume {options.resume}: no such checkpoint")
    return Path(options.resume)


# ---------------------------------------------------------------------------------------------------------------------
# Looking at it: held-out records, FLOP
# ---------------------------------------------------------------------------------------------------------------------

EVAL_T = (0.1, 0.3, 0.5, 0.7, 0.9)
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}    # dense bf16 FLOP/s, by what the device's name contains


@torch.no_grad()
def evaluate(policy, reference, records, options, place):
    """Preference loss, margin, accuracy and the four errors on held-out records at fixed t and fixed noise,
    {"eval_margin": …, "eval_win_t0.1": …}."""
    share, sums = math.ceil(len(records) / place.world), {}
    for i in range(share):                                 # every rank makes as many forwards: they are collectives
        index = place.rank + i * place.world
        row = records[index % len(records)]
        for t in EVAL_T:
            noise = torch.randn(row["win"].shape, generator=generator("eval", records.names[index % len(records)], t))
            batch = {k: v[None].to(place.device).float() for k, v in {**row, "noise": noise}.items()}
            _, metrics = realdpo_loss(policy, reference, win=batch["win"], lose=batch["lose"],
                                      cond=Condition(batch["text"], batch["image"]), beta=options.beta,
                                      t=torch.tensor([t], device=place.device), noise=batch["noise"],
                                      weighting=options.weighting)
            for key, value in metrics.items():
                of_all_t = key in ("preference", "margin", "accuracy")
                name, count = (f"eval_{key}", len(EVAL_T)) if of_all_t else (f"eval_{key}_t{t}", 1)
                sums[name] = sums.get(name, 0) + value.double() * (index < len(records)) / len(records) / count
    numbers = torch.stack(list(sums.values()))
    dist.all_reduce(numbers)
    return dict(zip(sums, numbers.tolist()))


def generated(denoiser, path, records, which, device="cpu", dtype=torch.float32):
    """A denoiser's videos (F,H,W,3) uint8 of the records numbered `which`, through the autoencoder of the model at
    `path`, from noise that depends on the number alone."""
    settings = sample.Options(**(sample.TINY if model.base_of(path) == "tiny" else {}))
    vae, empty = model.load_vae(path, device, dtype), records.empty_text()
    for i in which:
        latents = sample.generate(denoiser, records[i], empty, settings, device, "held-out", i, progress=False)
        yield data.to_uint8(vae.decode(latents)[0])


def evaluate_videos(policy, records, options, step, place):
    """The first `eval_videos` held-out records as the policy makes them now: videos/STEP-NAME.mp4."""
    rounds = math.ceil(min(options.eval_videos, len(records)) / place.world)
    mine = [(place.rank + i * place.world) % len(records) for i in range(rounds)]       # as many on every rank
    for i, video in zip(mine, generated(policy, options.model, records, mine, place.device, place.dtype)):
        data.write_video(Path(options.out) / "videos" / f"{step:06d}-{records.names[i]}.mp4", video, sample.Options.fps)


def forward_flops(config, grid, n_text):
    """FLOP of one sequence's forward pass in matrix products (24·D² a token and block) and in attention (4·S²·D a
    block), and its tokens S."""
    width, tokens = (config["num_attention_heads"] * config["attention_head_dim"],
                     n_text + math.prod(grid) // config["patch_size"] ** 2)
    return config["num_layers"] * 24 * width ** 2 * tokens, config["num_layers"] * 4 * tokens ** 2 * width, tokens


def step_flops(config, shape, options, n_lose):
    """(FLOP, tokens) of one step over all ranks; latents of shape (C,F,H,W).

    Policy: forward, backward (twice that) and what is recomputed; reference: forward.
    """
    products, attention, tokens = forward_flops(config, shape[1:], config["max_text_seq_length"])
    again = {"none": 0, "full": products + attention, "selective": products}[options.checkpointing]
    reference = products + attention if options.method in PREFERENCE else 0
    sequences = options.batch * {"realdpo": 1 + n_lose, "sft": 1, "dpo": 2, "rwr": n_lose}[options.method]
    return (3 * (products + attention) + again + reference) * sequences, tokens * sequences


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------

def check_options(options, world):
    """Raise UserError for options that contradict each other or the number of processes."""
    for name in ("batch", "micro_batch", "ema_every", "save_every", "keep", "eval_every", "gpus", "base_steps",
                 "epochs", "steps"):
        least = 0 if name in ("epochs", "steps") else 1    # 0: the other one decides
        if getattr(options, name) < least:
            raise UserError(f"{flag(name)} {getattr(options, name)}: expected at least {least}")
    if options.batch % world:
        raise UserError(f"--batch {options.batch}: expected a multiple of the {world} processes")
    local = options.batch // world
    if local % min(local, options.micro_batch):
        raise UserError(f"--micro-batch {options.micro_batch}: expected a divisor of a process's share, {local} of "
                        f"--batch {options.batch}, such as {math.gcd(local, options.micro_batch)}")
    if not 0 <= options.t_min < options.t_max <= 1:
        raise UserError(f"--t-min {options.t_min} --t-max {options.t_max}: expected 0 ≤ t-min < t-max ≤ 1")


def check_records(records, config):
    """Raise UserError for records that are not of the model with this config."""
    win, text, lose = (tuple(records[0][k].shape) if k in records[0] else None for k in ("win", "text", "lose"))
    if win[0] != config["out_channels"] or text != (config["max_text_seq_length"], config["text_embed_dim"]):
        raise UserError(f"{records.folder}: latents {win} and text {text} are not this model's "
                        f"({config['out_channels']} channels, "
                        f"text {config['max_text_seq_length']}×{config['text_embed_dim']}); "
                        "encode the videos with the model to be trained")
    if lose and lose[1:] != win:
        raise UserError(f"{records.folder}: win latents are {win} and lose latents {lose}; "
                        f"delete {records.folder}/lose and make the negatives again")


def open_log(file, first):
    """metrics.jsonl, open to append, without the lines of steps that will be done again."""
    lines = file.read_text().splitlines() if file.exists() else []
    kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] < first]
    with whole_file(file) as part:
        part.write_text("".join(line + "\n" for line in kept))
    return open(file, "a")


class Log:
    """metrics.jsonl, the console and, where it is installed, TensorBoard. On rank 0; the other ranks say nothing."""

    def __init__(self, options, first, rank):
        self.active = rank == 0
        if self.active:
            self.file = open_log(Path(options.out) / "metrics.jsonl", first)
            try:
                from torch.utils.tensorboard import SummaryWriter
                self.board = SummaryWriter(f"{options.out}/tensorboard", purge_step=first, flush_secs=10)
            except ImportError:
                self.board = None

    def __call__(self, step, metrics):
        if self.active:
            try:
                self.file.write(json.dumps({"step": step, **metrics}) + "\n")
                self.file.flush()
            except OSError as e:
                raise UserError(f"{self.file.name}: cannot be written ({e}); make room, then start again") from e
            for held_out in (False, True):                 # a line of their own for the held-out numbers, not by t
                shown = "  ".join(f"{k} {v:.4g}" for k, v in metrics.items()
                                  if k.startswith("eval") == held_out and "_t0." not in k)
                tqdm.write(f"step {step:4d}  {shown}") if shown else None
            for key, value in metrics.items() if self.board else ():
                self.board.add_scalar(key, value, step)


def draw_curves(folder):
    """RUN/metrics.jsonl as a picture, RUN/curves.svg: what to look at first (README, "Healthy and unhealthy")."""
    colours = ("#c33", "#36c", "#2a2", "#c80", "#90c")
    lines, panels, svg = [json.loads(line) for line in open(folder / "metrics.jsonl")], [], []
    for title, series in {
        "preference loss (log 2 = 0.69)": {"preference": "train", "eval_preference": "held out"},
        "accuracy": {"accuracy": "train", "eval_accuracy": "held out"},
        "errors": {name: name for name in ("win", "ref_win", "lose", "ref_lose")},
        "held-out win error, by t": {f"eval_win_t{t}": f"t = {t}" for t in EVAL_T},
        "held-out lose error, by t": {f"eval_lose_t{t}": f"t = {t}" for t in EVAL_T},
    }.items():
        points = {label: [(line["step"], line[key]) for line in lines if key in line] for key, label in series.items()}
        if any(points.values()):
            panels.append((title, {label: p for label, p in points.items() if p}))
    for i, (title, points) in enumerate(panels):
        low, high = (f(y for p in points.values() for _, y in p) for f in (min, max))
        last, left, top, width, height = max(1, lines[-1]["step"]), 320 * i + 60, 40, 240, 150
        at = lambda x, y: f"{left + width * x / last:.1f},{top + height * (1 - (y - low) / (high - low or 1)):.1f}"
        svg += [f'<text x="{left}" y="20" font-weight="bold">{title}</text>',
                f'<rect x="{left}" y="{top}" width="{width}" height="{height}" fill="none" stroke="#999"/>',
                *(f'<text x="{left - 5}" y="{y}" text-anchor="end">{value:.3g}</text>'
                  for y, value in ((top + 10, high), (top + height, low))),
                f'<text x="{left + width}" y="{top + height + 15}" text-anchor="end">step {last}</text>']
        for k, (label, p) in enumerate(points.items()):
            path = " ".join(at(*point) for point in p)
            svg += [f'<polyline points="{path}" fill="none" stroke="{colours[k]}"/>',
                    f'<text x="{left + 50 * k}" y="{top + height + 32}" fill="{colours[k]}">{label}</text>']
    with whole_file(folder / "curves.svg") as part:
        part.write_text(f'<svg xmlns="http://www.w3.org/2000/svg" width="{320 * len(panels)}" height="230" '
                        'font-family="sans-serif" font-size="11"><rect width="100%" height="100%" fill="white"/>\n'
                        + "\n".join(svg) + "\n</svg>\n")


def export(policy, options, rank):
    """The trained transformer in the published layout, in the precision it will run in."""
    model.save_dit(policy, options.out, torch.bfloat16)
    if rank == 0:
        base = str(Path(options.model).resolve()) if Path(options.model).is_dir() else options.model
        with whole_file(Path(options.out) / "base.json") as part:
            part.write_text(json.dumps({"model": model.base_of(base)}))


def train(options, place, mesh):
    """Steps until done or asked to stop, checkpoints on the way, the trained transformer at the end.

    Returns whether training is complete.
    """
    records = Records(options.data, negatives=options.method != "sft", scores=options.method in SCORED)
    held_out = Records(options.eval_data) if options.eval_data else None
    check_options(options, place.world)
    steps, begin = number_of_steps(options, len(records)), time.time()
    config = model.read_dit_config(options.model)
    for each in (records, held_out) if held_out else (records,):
        check_records(each, config)
    policy, reference = load_models(options, place, mesh)
    optimizer = make_optimizer(policy, options)
    state = training_state(policy, reference, optimizer)
    checkpoint = find_checkpoint(options)
    first = load_checkpoint(state, optimizer, checkpoint, options) if checkpoint else 0
    if place.rank == 0 and first:
        print(f"continuing from {checkpoint}")
    flops, tokens = step_flops(config, records[0]["win"].shape, options, len(records[0].get("lose", ())))
    peak = next((p for gpu, p in PEAK.items()
                 if place.device.type == "cuda" and gpu in torch.cuda.get_device_name()), None)
    log = Log(options, first, place.rank)
    bar = tqdm(range(first, steps), initial=first, total=steps, desc=options.method, disable=place.rank > 0)
    with finish_on_signals():
        for step in bar:
            tick = time.time()
            if options.max_minutes and tick - begin > 60 * options.max_minutes:
                stop.set()
            metrics, asked = train_step(policy, reference, optimizer, records, options, step, place)
            metrics["seconds"] = time.time() - tick
            metrics["tokens_per_second"] = tokens / metrics["seconds"]
            if peak:
                metrics["mfu"] = flops / metrics["seconds"] / place.world / peak
            if held_out and ((step + 1) % options.eval_every == 0 or step + 1 == steps):
                metrics |= evaluate(policy, reference, held_out, options, place)
                if options.eval_videos:
                    evaluate_videos(policy, held_out, options, step + 1, place)
            log(step, metrics)
            if asked or step + 1 == steps or (step + 1) % options.save_every == 0:
                save_checkpoint(state, options, step + 1, place.rank)
                if place.rank == 0:
                    draw_curves(Path(options.out))
            if asked and step + 1 < steps:
                bar.close()                                # so that what follows is the last line
                if place.rank == 0:
                    print(f"stopped after {step + 1} steps; checkpoint saved in {options.out}/checkpoints, "
                          "and the same command continues")
                return False
    export(policy, options, place.rank)
    return True


# ---------------------------------------------------------------------------------------------------------------------
# The dry run: the real code on tensors without data
# ---------------------------------------------------------------------------------------------------------------------

def report_dry_run(options, memory, config, shape, n_lose, parameters, clips=5000, utilisation=0.4):
    """Print what `dry_run` found, and how long the paper's 5 k clips would take at a stated part of an H100's peak."""
    products, attention, _ = forward_flops(config, shape[1:], config["max_text_seq_length"])
    flops, tokens = step_flops(config, shape, options, n_lose)
    print(f"{parameters:,} parameters, {options.gpus} ranks, {options.batch} samples and {tokens:,} tokens a step")
    print(f"{flops / options.batch / 1e15:.3g} PFLOP a sample, {flops / 1e15:.3g} PFLOP a step")
    for kind, size in memory.items():
        print(f"{size / 2 ** 30:7.2f} GiB a rank  {kind}")
    total = sum(memory.values()) / 2 ** 30
    print(f"{total:7.2f} GiB a rank  at the peak, which {'fits' if total < 78 else 'does not fit'} "
          "into the 78 GiB that an 80 GB GPU gives")
    hours = lambda flops: flops / options.gpus / (utilisation * PEAK["H100"]) / 3600
    steps = number_of_steps(options, clips)
    print(f"at {utilisation:.0%} of an H100's {PEAK['H100'] / 1e12:.0f} TFLOP/s: {3600 * hours(flops):.3g} s a step, "
          f"{steps} steps ({clips} clips) {hours(steps * flops):.3g} h;\n"
          f"before that, {n_lose} negatives a clip, 50 steps with guidance: "
          f"{hours(clips * n_lose * 50 * 2 * (products + attention)):.3g} h")


def dry_run(options):
    """What a run would take on `gpus` ranks: the step on fake tensors, its memory followed by torch's FSDP tracker."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
    from torch.testing._internal.distributed.fake_pg import FakeStore
    check_options(options, options.gpus)
    print("two steps on tensors without data; at 5B this takes some minutes")
    config = model.PUBLISHED_DIT if options.model == data.HUB_MODEL else model.read_dit_config(options.model)
    shape = (config["out_channels"], (config["sample_frames"] - 1) // config["temporal_compression_ratio"] + 1,
             config["sample_height"], config["sample_width"])
    n_lose, local = 3, options.batch // options.gpus
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=options.gpus)
    mesh = init_device_mesh("cpu", (options.gpus,), mesh_dim_names=("dp",))
    model.rope_table.cache_clear()
    with FakeTensorMode():
        policy, reference = (model.Denoiser(model.empty(model.DiT, config, torch.float32, "cpu",
                                                        lambda net: shard(net, mesh, torch.bfloat16)),
                                            model.FlowPrediction(), None) for _ in range(2))
        policy.checkpointing = CHECKPOINTING[options.checkpointing]
        tracker = FSDPMemTracker(policy.net, make_optimizer(policy, options))
        reference.requires_grad_(False)
        n = min(options.micro_batch, local)
        batch = dict(win=torch.randn(n, *shape), lose=torch.randn(n, n_lose, *shape),
                     t=torch.rand(n), noise=torch.randn(n, *shape), scores=torch.rand(n, n_lose),
                     cond=Condition(torch.randn(n, config["max_text_seq_length"], config["text_embed_dim"]),
                                    torch.randn(n, shape[0], 1, *shape[2:])))
        with tracker:
            for _ in range(2):                             # the second meets the first's gradients, as later ones do
                loss, _ = loss_of(policy, reference, batch, options)
                if loss.requires_grad:
                    loss.backward()
    model.rope_table.cache_clear()                         # it holds fake tensors
    found = {k.value if hasattr(k, "value") else k: v
             for k, v in tracker.get_tracker_snapshot("peak")[torch.device("cpu")].items()}
    held = sum(t.to_local().nbytes if hasattr(t, "to_local") else t.nbytes for t in reference.state_dict().values())
    memory = {"parameters": found["Sharded Param"] + found["Unsharded Param"] + found["All Gather"] + found["Buffer"],
              "gradients": found["Sharded Grad"] + found["Unsharded Grad"] + found["Reduce Scatter"],
              "Adam": found["OptState"], "reference": held,
              "activations": found["Activation"] - (held if options.method in PREFERENCE else 0),
              "temporaries": found["Temp"], "context, NCCL …": 5 * 2 ** 30}             # the last: a guess, 4 to 6
    report_dry_run(options, memory, config, shape, n_lose, sum(p.numel() for p in policy.parameters()))
    dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------------------------------
# The laptop run: the tiny model on the toy world, by the same road as real videos
# ---------------------------------------------------------------------------------------------------------------------

# Figures that the base saw, that it is aligned with, that judge the result, and that choose a learning rate before.
KINDS = ("corpus", "real", "held-out", "validation")
COUNTS = {"real": 48, "held-out": 16}


def world_of(seed, kind):
    """The seed of a toy world: no two kinds, and no two --seed, draw the same figures."""
    return 10 * seed + KINDS.index(kind)


def run(module, rank, **options):
    """One stage, and the command line that does the same."""
    if rank == 0:
        print(f"\n$ python {module.__name__}.py " + " ".join(f"{flag(k)} {v}" for k, v in options.items()))
    module.main(module.Options(**options))


def score_negatives(cache, seed):
    """scores.json for toy records, as a reward model would write it: minus the distance to the nearest real video."""
    file, newest = cache / "scores.json", max(lose.stat().st_mtime for lose in (cache / "lose").iterdir())
    if file.exists() and file.stat().st_mtime >= newest:
        return
    records, vae = Records(cache), model.load_vae("tiny")
    scores = {name: [-data.judge(data.to_uint8(video), data.draw_figure(world_of(seed, "real"), i))["rvd"]
                     for video in vae.decode(records[i]["lose"].float())]
              for i, name in enumerate(tqdm(records.names, desc="scoring negatives"))}
    with whole_file(file) as part:
        part.write_text(json.dumps(scores))


def prepare(out, name, seed, counts, rank, scores=True):
    """Toy videos, records and negatives under `out`, made by the commands that a user would call. Returns the cache."""
    for kind, count in counts.items():
        if rank == 0:
            data.write_toy_videos(Path(out) / "videos" / kind, count, world_of(seed, kind))
        dist.barrier()
        run(data, rank, videos=f"{out}/videos/{kind}", model=name, out=f"{out}/cache/{kind}")
        dist.barrier()
    run(sample, rank, data=f"{out}/cache/real", model=name, **sample.TINY)
    if rank == 0 and scores:
        score_negatives(Path(out) / "cache" / "real", seed)
    dist.barrier()
    return f"{out}/cache/real"


@cache
def codec():
    """What `continuations` asks for: videos as the tiny autoencoder gives them back."""
    vae = model.load_vae("tiny")
    return lambda videos: np.stack([data.to_uint8(video) for video in vae.decode(
        vae.encode(torch.stack([data.fit(v, *v.shape[1:3]) for v in videos])))])


def judged(videos, world):
    """{measure: [a number a video]} of (number of a world's figure, video of it) pairs."""
    scores = [data.judge(video, data.draw_figure(world, number), codec()) for number, video in videos]
    return {measure: [score[measure] for score in scores] for measure in scores[0]}


def means(scores):
    """What `judged` found, in a line."""
    return "  ".join(f"{measure} {np.mean(values):.2f}" for measure, values in scores.items())


def judge_folder(options):
    """Print the measures of mp4s from any source: NUMBER.mp4 shows the held-out figure of that number."""
    files = sorted(Path(options.judge).glob("*.mp4"))
    if not files or not all(file.stem.isdecimal() for file in files):
        raise UserError(f"--judge {options.judge}: expected a folder of 00000.mp4, 00001.mp4, …, "
                        "each of the held-out figure of its number")
    videos = ((int(file.stem), data.read_toy_video(file)) for file in tqdm(files, desc="judging"))
    print(f"{len(files)} videos (mean):  {means(judged(videos, world_of(options.seed, 'held-out')))}")


def rivals(options):
    """The runs to compare: RealDPO, and supervised training on the same records, steps and noise at the same rate."""
    sft = dataclasses.replace(options, method="sft", out=f"{options.out}/sft")
    return [sft, options] if options.method == "realdpo" else [options]


def show(options, runs):
    """Held-out figures of the base and of `runs` (Options each), as a GIF and an mp4, and what the metrics say."""
    records, out = Records(f"{options.out}/cache/held-out", negatives=False), Path(options.out)
    world = world_of(options.seed, "held-out")
    columns = [("base", "tiny"), *((each.method, each.out) for each in runs)]
    videos = {name: list(generated(model.load_dit(path), path, records, range(len(records))))
              for name, path in tqdm(columns, desc="held-out figures")}
    print(f"{len(records)} held-out figures (mean):")
    for name, made in videos.items():
        print(f"  {name:7}  {means(judged(enumerate(made), world))}")
        for i, video in enumerate(made):
            data.write_toy_video(out / "held-out" / name / f"{i:05d}.mp4", video)
    real = [data.toy_video(world, i)[0] for i in range(8)]
    rows = [np.concatenate([r[:1].repeat(len(r), axis=0), *made, r], axis=2)
            for r, *made in zip(real, *videos.values())]
    grid = data.enlarge(np.concatenate([np.concatenate(rows[:4], axis=1), np.concatenate(rows[4:], axis=1)], axis=2), 3)
    for file in (out / "held-out.gif", out / "held-out.mp4"):
        data.write_video(file, grid, data.FPS)
    print(f"first frame | {' | '.join(videos)} | real, two figures a row: {out}/held-out.gif and .mp4; "
          f"one by one: {out}/held-out/")


# ---------------------------------------------------------------------------------------------------------------------
# The tiny model, from nothing: text encoder, autoencoder, and a base whose world was imperfect
# ---------------------------------------------------------------------------------------------------------------------

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


def optimize(parameters, loss, steps, lr, file, seed=0, save_every=500):
    """Muon for matrices and Adam for all else, on `loss(generator)`, with a progress bar; its state goes to `file` now
    and then, from which it continues. Raises UserError where that was made with another seed or number of steps."""
    parameters, made_by = list(parameters), {"fingerprint": dict(steps=steps, seed=seed)}
    torch.set_flush_denormal(True)                         # else Adam's moments of idle weights slow a CPU down
    model.keep_freed_memory()
    matrices, others = ([p for p in parameters if (p.ndim == 2) == matrix] for matrix in (True, False))
    optimizer = torch.optim.AdamW(others, lr, betas=(0.9, 0.99), weight_decay=0.0)
    kinds = {"weight": parameters, "momentum": [torch.zeros_like(p) for p in matrices],
             "exp_avg": [torch.zeros_like(p) for p in others], "exp_avg_sq": [torch.zeros_like(p) for p in others]}
    state, first = {f"{kind}.{i}": t.detach() for kind, ts in kinds.items() for i, t in enumerate(ts)}, 0
    if file.exists():
        saved = data.read_header(file)[1]
        data.check_metadata(file, saved, made_by)
        first = saved["step"]
        for name, tensor in data.read_tensors(file).items():
            state[name].copy_(tensor)
    for p, m, v in zip(others, kinds["exp_avg"], kinds["exp_avg_sq"]):
        optimizer.state[p] = dict(step=torch.tensor(float(first)), exp_avg=m, exp_avg_sq=v)
    bar, average = tqdm(range(first, steps), initial=first, total=steps, desc=file.stem), None
    for step in bar:
        value = loss(generator(file.stem, seed, step))
        for p in parameters:
            p.grad = None
        value.backward()
        nn.utils.clip_grad_norm_(others, 1.0)
        optimizer.param_groups[0]["lr"] = now = cosine(step, steps, lr)
        optimizer.step()
        muon(matrices, kinds["momentum"], now)
        average = value.item() if average is None else 0.99 * average + 0.01 * value.item()
        bar.set_postfix(loss=f"{average:.4f}")
        if (step + 1) % save_every == 0:
            data.write_tensors(file, state, step=step + 1, **made_by)


def make_text_encoder(folder):
    """A SentencePiece vocabulary of the toy captions and a random T5, frozen: it only has to tell captions apart."""
    import sentencepiece
    words, rng = (sorted({w for action in data.ACTIONS for w in action.split()} | {"a", "figure", *data.SPEEDS}),
                  np.random.default_rng(0))
    sentences = (" ".join(rng.choice(words, 6)) for _ in range(1000))       # shuffled, so that the pieces are the words
    with whole_file(folder / "tokenizer" / "spiece.model") as part, open(part, "wb") as f:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences, model_writer=f, model_type="unigram", vocab_size=TINY_T5["vocab_size"],
            pad_id=0, eos_id=1, unk_id=2, bos_id=-1, hard_vocab_limit=False, minloglevel=2)
    torch.manual_seed(0)
    model.save_part(model.T5Encoder(TINY_T5), TINY_T5, folder / "text_encoder", torch.bfloat16, stem="model")


def corpus_clip(index, imperfect, seed=0):
    """Clip `index` of the corpus the base learns from; where `imperfect`, each has faults, of a strength of its own."""
    strength = float(np.random.default_rng([seed, index, 3]).uniform(0.4, 1)) if imperfect else 0.0
    return data.toy_video(world_of(seed, "corpus"), index, strength=strength)


def make_vae(folder, steps):
    """A small CogVideoX autoencoder, trained on clean and imperfect figures alike."""
    torch.manual_seed(0)
    vae, config = model.VAE(TINY_VAE), dict(TINY_VAE)
    clips = torch.stack([data.fit(corpus_clip(i, i % 2)[0], 32, 32) for i in tqdm(range(2048), desc="drawing figures")])

    def reconstruct(video, noise):
        mean, std = vae.posterior(video)
        past, z = {}, mean + std * noise(mean)
        return torch.cat([vae.decoder(z[:, :, chunk], past) for chunk in model.chunks(z.shape[2], 2)], dim=2), mean, std

    def loss(rng):
        video = clips[torch.randint(len(clips), (4,), generator=rng)]
        output, mean, std = reconstruct(video, lambda z: torch.randn(z.shape, generator=rng))
        kl = (mean ** 2 + std ** 2 - 1 - 2 * std.log()).mean() / 2
        return (output - video).abs().mean() + (output - video).square().mean() + 1e-4 * kl

    optimize(vae.parameters(), loss, steps, 3e-3, folder / "autoencoder.safetensors")
    with torch.no_grad():
        held_out = torch.stack([data.fit(data.toy_video(world_of(0, "held-out"), i)[0], 32, 32) for i in range(32)])
        output, mean, _ = reconstruct(held_out, torch.zeros_like)
    config["scaling_factor"] = round(1 / mean.std().item(), 6)
    error = (output.clamp(-1, 1) - held_out).square().mean().item() / 4
    print(f"autoencoder: {-10 * math.log10(error):.1f} dB on 32 held-out clips")
    model.save_part(vae, config, folder / "vae", torch.bfloat16)


def make_base(folder, steps, seed=0, imperfect=True, clips=4096, unseen=128):
    """Pre-train the transformer by flow matching on a corpus of imperfect figures, as the web is of videos, around the
    text encoder and autoencoder in `folder`. Prints the loss on `unseen` clips more: compared with that of another
    number of steps, it tells how far from converged the base is."""
    (folder / "transformer").mkdir(exist_ok=True)          # the text encoder asks it for the length of a caption
    (folder / "transformer" / "config.json").write_text(json.dumps(TINY_DIT))
    vae, encode_text = model.load_vae(folder), model.load_text_encoder(folder)
    empty, samples = encode_text([""])[0], []
    for first in tqdm(range(0, clips + unseen, 16), desc="encoding the corpus"):
        drawn, rng = [corpus_clip(first + i, imperfect, seed) for i in range(16)], generator("corpus", seed, first)
        video = torch.stack([data.fit(frames, 32, 32) for frames, _ in drawn])
        samples.append((vae.encode(video, rng), vae.encode(video[:, :, :1], rng), encode_text([c for _, c in drawn])))
    win, image, text = (torch.cat(x) for x in zip(*samples))
    torch.manual_seed(seed)
    net = model.DiT(TINY_DIT)
    # Every block starts as the identity (DiT's adaLN-Zero).
    for linear in ([n.linear for b in net.transformer_blocks for n in (b.norm1, b.norm2)]
                   + [net.norm_out.linear, net.proj_out]):
        nn.init.zeros_(linear.weight), nn.init.zeros_(linear.bias)
    # The table of positions is published as a buffer, but somebody trained it.
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


def from_scratch(options):
    """Make the tiny model in --out, part by part; a part that is there is kept."""
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "text_encoder").is_dir():
        make_text_encoder(folder)
    if not (folder / "vae").is_dir():
        make_vae(folder, 3500)
    make_base(folder, options.base_steps, options.seed)
    print(f"the tiny model is in {folder}; put it in the place of {model.TINY} to use it as --model tiny")


# ---------------------------------------------------------------------------------------------------------------------
# The experiment: several bases, every method at several rates, one table
# ---------------------------------------------------------------------------------------------------------------------

# Row of the table: its options, and the learning rates among which the validation figures choose, as many for each.
# RATE is among all of them. An SFT step costs 3 passes of a video; a RealDPO step 4 · 3 of the policy and 4 of the
# reference, 16 in all.
RATE, LOW, HIGH = 3e-4, (1e-5, 5e-5, 3e-4), (1e-4, 3e-4, 1e-3)
TRIALS = {
    "SFT": (dict(method="sft"), HIGH),
    "RealDPO": (dict(), HIGH),
    "SFT, equal compute": (dict(method="sft", steps=533), HIGH),
    "RealDPO, no anchor": (dict(anchor=0.0), LOW),
    "DPO": (dict(method="dpo", anchor=0.0), LOW),
    "RWR": (dict(method="rwr"), LOW),
}
SIZES = COUNTS | {"held-out": 64, "validation": 32}
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)          # Student's t at 97.5 %, by degrees of freedom


def scored(run, folder, seed):
    """{split: {measure: [a number a figure]}} of the model in `run` on a seed's figures, kept in scores-SEED.json."""
    file = Path(run) / f"scores-{seed}.json"
    if not file.exists():
        denoiser = model.load_dit(run)
        scores = {split: judged(enumerate(generated(denoiser, run, Records(folder / "cache" / split, negatives=False),
                                                    range(SIZES[split]))), world_of(seed, split))
                  for split in ("validation", "held-out")}
        with whole_file(file) as part:
            part.write_text(json.dumps(scores))
    return json.loads(file.read_text())


def table(scores):
    """Markdown: held-out means over seeds, with 95 % intervals of rvd, of each trial at the one rate that all share
    and at its own best; `scores` {(row, learning rate, seed): `scored`}."""
    seeds = sorted({seed for *_, seed in scores})
    mean = lambda row, lr, split, measure: np.array([np.mean(scores[row, lr, s][split][measure]) for s in seeds])

    def interval(values):
        if len(values) < 2:
            return f"{values.mean():.2f}"
        return f"{values.mean():.2f} ± {T95[len(values) - 2] * values.std(ddof=1) / len(values) ** 0.5:.2f}"

    def line(row, lr, sft):
        rvd = mean(row, lr, "held-out", "rvd")
        others = (f"{mean(row, lr, 'held-out', m).mean():.2f}"
                  for m in ("limb_change", "jerkiness", "identity_loss", "action_match", "motion"))
        better = ((f"{(rvd < other).sum()}/{len(seeds)}", interval(rvd - other))
                  for other in (mean("base", 0.0, "held-out", "rvd"), sft))
        return " | ".join([f"| {row}", f"{lr:g}" if lr else "–", interval(rvd), *others,
                           *(f"{count} ({difference})" for count, difference in better)]) + " |"

    best = {row: min(rates, key=lambda lr: mean(row, lr, "validation", "rvd").mean())
            for row, (_, rates) in TRIALS.items()}
    lines = ["| | rate | rvd | limb_change | jerkiness | identity_loss | action_match | motion "
             "| below base | below SFT |", "|---" * 10 + "|"]
    for rows in {"clean-trained": 0.0, "base": 0.0, **dict.fromkeys(TRIALS, RATE)}, best:
        sft = mean("SFT", rows["SFT"], "held-out", "rvd")
        lines += [line(row, lr, sft) for row, lr in rows.items()]
    return "\n".join(lines)


def own_base(folder, seed, steps, imperfect=True):
    """A model folder with a base of its own, and the shipped autoencoder and text encoder. Seed 0's base is the shipped
    one too: made in the same way. Raises UserError where there is one of another number of steps."""
    file, made_by = folder / "base.json", dict(model="tiny", fingerprint=dict(steps=steps))
    if file.exists():
        data.check_metadata(file, model.read_json(file), made_by)
    with whole_file(file) as part:
        part.write_text(json.dumps(made_by))               # for the parts it does not have, see model.resolve
    shipped = (seed, steps, imperfect) == (0, Options.base_steps, True)
    if not shipped and not list(folder.glob("transformer/*.safetensors")):
        make_base(folder, steps, seed, imperfect)
    return str(folder)


def experiment(options, place, mesh):
    """For each of `experiment` seeds a base of its own, and every trial on the same records, steps and noise; then
    the first seed's clean-trained model, which shows how much room there was, and the table. What is there already is
    kept; processes may share the work, each with its own seeds (`--seed`)."""
    if options.experiment > len(T95) + 1:
        raise UserError(f"--experiment {options.experiment}: at most {len(T95) + 1}")
    scores = {}
    folders = {seed: Path(options.out) / f"seed-{seed}"
               for seed in range(options.seed, options.seed + options.experiment)}
    for seed, folder in folders.items():
        base = own_base(folder / "base", seed, options.base_steps)
        records = prepare(folder, base, seed, SIZES, place.rank)
        scores["base", 0.0, seed] = scored(base, folder, seed)
        for row, (changes, rates) in TRIALS.items():
            for lr in rates:
                each = dataclasses.replace(options, out=f"{folder}/{row}-{lr:g}", **TINY | changes | dict(
                    model=base, data=records, seed=seed, lr=lr, epochs=0, experiment=0))
                if not (Path(each.out) / "base.json").exists():
                    Path(each.out).mkdir(exist_ok=True)
                    with open(f"{each.out}/log.txt", "a") as log, redirect_stdout(log):
                        if not train(each, place, mesh):
                            return
                scores[row, lr, seed] = scored(each.out, folder, seed)
    ceiling = own_base(folders[options.seed] / "clean-trained", options.seed, options.base_steps, imperfect=False)
    for seed, folder in folders.items():
        scores["clean-trained", 0.0, seed] = scored(ceiling, folder, seed)
    print(table(scores) + f"\n\nheld-out figures, means over the bases; every run is in {options.out}/seed-*/")


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------

def main(options):
    """Everything for the tiny model where there is no cache; else train on the cache there is."""
    if options.dry_run:
        return dry_run(options)
    if options.judge:
        return judge_folder(options)
    if options.from_scratch or options.experiment:
        if placement().world > 1:
            raise UserError("--from-scratch and --experiment: run as one process; share seeds out by --seed instead")
        check_options(options, 1)
    if options.from_scratch:
        return from_scratch(options)
    place, mesh = start()
    if options.experiment:
        return experiment(options, place, mesh)
    laptop = options.model == "tiny" and options.data == Options.data and not Path(options.data).is_dir()
    if laptop:
        options.data = prepare(options.out, "tiny", options.seed, COUNTS, place.rank, options.method in SCORED)
    elif not Path(options.data).is_dir():
        raise UserError(f"--data {options.data}: no such cache; "
                        f"make it with: python data.py --videos DIR --model {options.model} --out {options.data}"
                        f" and: python sample.py --model {options.model} --data {options.data}")
    runs = rivals(options) if laptop else [options]
    if all(train(each, place, mesh) for each in runs) and place.rank == 0:              # the first one stopped ends it
        show(options, runs) if laptop else print(f"done: {options.out}/curves.svg shows how; try: python sample.py "
                                                 f"--model {options.out} --image first.png --prompt \"…\"")
    dist.destroy_process_group()


if __name__ == "__main__":
    command(main, Options, TINY)
