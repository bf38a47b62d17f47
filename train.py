"""RealDPO, the training run: one code path for a laptop, two CPU processes, one GPU, eight, and several machines.

    python train.py                                                    laptop: everything, on the tiny model, in minutes
    python train.py --model MODEL --data CACHE --out RUN               one process
    torchrun --nproc_per_node 8 train.py                               CogVideoX-5B-I2V on the records in cache/

RUN then holds transformer/ (opens here, with --model RUN, and in diffusers), metrics.jsonl, checkpoints/ and, with
--bench, videos/. The same command continues an interrupted run from its last checkpoint.
"""
import dataclasses, json, math, os, re, shutil, signal, threading, time
from collections import Counter
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from itertools import product
from operator import itemgetter
from pathlib import Path
from shlex import quote
from typing import Literal, NamedTuple

import data, model, sample                                 # before torch: see the top of model.py
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from tqdm import tqdm

from data import Records, check_metadata, flag, generator, option, this_process, write_json
from model import UserError
from realdpo import (Condition, best_and_worst, ema_update, realdpo_loss, rwr_loss, sft_loss, streamed_realdpo_loss)


@dataclasses.dataclass
class Options:
    """Align an image-to-video transformer with real videos."""
    model: str = option("", "model folder, hub id, run or tiny; default: 5B-I2V with a GPU, else tiny", "files")
    data: str = option("", "cache of records, from data.py and sample.py; default: cache, and for tiny a toy world's")
    out: str = option("", "folder for the trained transformer, checkpoints and logs; default: run, for tiny run-tiny")
    resume: str = option("", "the checkpoint to start from; default, and always where there is one: the last in --out")
    method: Literal["realdpo", "sft", "dpo", "rwr"] = option("realdpo", "dpo and rwr: on scored negatives", "the loss")
    beta: float = option(5000.0, "strength of the preference, on the mean squared error (release: 5000)")
    anchor: float = option(2000.0, "weight of the win error added to the loss (paper: 0, see README)")
    weighting: Literal["x0", "velocity"] = option("x0", "of the error at t: 1 for x0 (App. C), 1/t² for velocity")
    t_draw: Literal["uniform", "low", "release"] = option("release", "of the noise level t: uniform up to 1 (paper) "
                                                          "or to 0.64; or as the release, with few small ones")
    lose_per_step: int = option(1, "negatives drawn per sample and step, for realdpo; 0: all (paper: 3)")
    compare_every: int = option(4, "realdpo: steps from one comparison with lose and reference to the next; the anchor "
                                   "alone trains between them (paper: 1)")
    ema_decay: float = option(0.996, "ω of the reference (Eq. 7, paper: 0.996, release: 0.999); 1: frozen")
    ema_every: int = option(1, "steps between two updates of the reference (paper: not given; release: 100)")
    lr: float = option(1e-5, "learning rate after warm-up (paper: 1e-5; release: 1e-6)", "the optimizer")
    warmup: int = option(20, "steps of linear warm-up (release: 100)")
    decay: float = option(0.5, "part of the steps, at the end, over which the rate falls to zero (paper: 0)")
    epochs: int = option(0, "passes over the records; default: 10 (paper)", either=True)
    steps: int = option(0, "training steps, in place of --epochs", either=True)
    batch: int = option(8, "samples per step over all GPUs (paper: 8); each a win with its lose")
    micro_batch: int = option(1, "samples a GPU takes at once, at most its share of a batch", "the hardware")
    checkpointing: Literal["none", "full", "selective"] = option("selective", "what backward computes again")
    graphs: Literal["all", "two", "one"] = option("", "alive at a time, of a sample's 1 + negatives: fewer take less "
                                                  "memory for the same gradient; default: as many as fit")
    offload: bool = option(False, "keep the weights in CPU memory, a block at a time on the GPU: for one or two GPUs")
    compile: bool = option(False, "torch.compile each block")
    dry_run: list = option((), "only compute what GPUs need, in memory and hours: 1 2 8, or 2x8 for two machines of 8")
    save_every: int = option(200, "steps between checkpoints, and between looks at --eval-data and --bench", "the run")
    max_minutes: float = option(0.0, "stop with a checkpoint after this long; 0: never")
    eval_data: str = option("", "cache of held-out records with negatives; the first 8 are looked at")
    bench: str = option("", "folder of pictures with captions, of which to make videos at every checkpoint")
    seed: int = option(0, "of order, noise, t and drawn negatives")


WEIGHT_DECAY, CLIP = 1e-4, 1.0          # of AdamW; the largest gradient norm. The paper gives neither
PREFERENCE = ("realdpo", "dpo")         # the methods that compare with a reference
SCORED = ("dpo", "rwr")                 # the methods that learn from scored generated videos, not from real ones
CHECKPOINTING = {"none": False, "full": True, "selective": "selective"}
KEEP = 2                                # checkpoints
# The noise levels of CogVideoX's first 500 training steps, of 1000. The release draws one of them; few are small.
RELEASE_T = model.VPrediction(dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012,
                                   snr_shift_scale=1.0)).t[:500].float()
LOW_T = 0.6387                          # the largest of them


# ---- One step, from the records to the updated reference ------------------------------------------------------------

def batch_indices(options, count, step):
    """Indices of the records of one global batch, a function of (seed, step) alone, with a new order each epoch."""
    indices = []
    for position in range(step * options.batch, (step + 1) * options.batch):
        epoch, place = divmod(position, count)
        order = torch.randperm(count, generator=generator("order", options.seed, epoch))
        indices.append(order[place].item())
    return indices


def compares(options, step):
    """Whether a step looks at negatives and reference. The step's number decides, so all ranks do the same."""
    return options.method != "realdpo" or step % options.compare_every == 0


def draw_sample(record, options, step, place, t_min):
    """A record with this step's t, noise and negatives, a function of (seed, step, place in the batch). t is drawn as
    the release draws it, or uniformly from (t_min, 1] or (t_min, 0.6387]; below t_min the network was never trained."""
    rng = generator("train", options.seed, step, place)
    u = torch.rand((), generator=rng)
    if options.t_draw == "release":
        record["t"] = RELEASE_T[int(u * len(RELEASE_T))]
    else:
        t_max = LOW_T if options.t_draw == "low" else 1.0
        record["t"] = t_min + (t_max - t_min) * (1 - u)
    record["noise"] = torch.randn(record["win"].shape, generator=rng)
    if "noised" in record:
        noised = record.pop("noised")
        record["image"] = noised[torch.randint(len(noised), (), generator=rng)]
    if "lose" in record and options.lose_per_step and options.method == "realdpo":
        drawn = torch.randperm(len(record["lose"]), generator=rng)[:options.lose_per_step]
        record["lose"] = record["lose"][drawn]
    return record


def loss_of(policy, reference, batch, options):
    """Loss and metrics of a micro-batch (a dict of stacked records) by the chosen method. The caller runs the backward
    pass. With --graphs two or one, that of the negatives has been run already."""
    common = dict(cond=Condition(batch["text"], batch["image"]), t=batch["t"], noise=batch["noise"],
                  weighting=options.weighting)
    if options.method == "sft":
        return sft_loss(policy, win=batch["win"], **common)
    if options.method == "rwr":
        return rwr_loss(policy, videos=batch["lose"], scores=batch["scores"], **common)
    if "lose" not in batch:                                # a step between two comparisons
        loss, metrics = sft_loss(policy, win=batch["win"], **common)
        return options.anchor * loss, metrics
    common |= dict(win=batch["win"], lose=batch["lose"], beta=options.beta)
    if options.method == "realdpo":
        common |= dict(anchor=options.anchor, scale=options.compare_every)
    else:                                                  # DPO has no anchor, as published
        common["win"], common["lose"] = best_and_worst(batch["lose"], batch["scores"])
    if options.graphs == "all":
        return realdpo_loss(policy, reference, **common)
    return streamed_realdpo_loss(policy, reference, graphs=options.graphs, **common)


def accumulate_gradients(policy, reference, records, samples, options, step, device):
    """Forward and backward passes of this rank's `samples`, (place in the batch, record index) pairs, a micro-batch at
    a time. Returns their mean metrics. Micro-batches are equally large, so their mean gradient is the batch's."""
    size = min(options.micro_batch, len(samples))
    parts = len(samples) // size
    total = Counter()
    for part in range(parts):
        rows = []
        for place, index in samples[part * size:(part + 1) * size]:
            record = records.read(index, negatives=compares(options, step))
            rows.append(draw_sample(record, options, step, place, policy.t_min))
        batch = {}
        for name in rows[0]:
            batch[name] = torch.stack([row[name] for row in rows]).to(device).float()
        send_gradients(policy, False)
        loss, metrics = loss_of(policy, reference, batch, options)
        send_gradients(policy, part == parts - 1)
        loss.backward()
        for name, value in {"loss": loss.detach(), **metrics}.items():
            total[name] += value.double() / parts
    torch._foreach_div_([p.grad.to_local() for p in policy.parameters()], parts)
    return dict(total)


def learning_rate(options, step, steps):
    """The learning rate at a step of a run of `steps`: it rises over --warmup and falls to zero over the last part,
    --decay, of the steps. With a constant rate, the last iterate is noisy: on the toy, runs that end at zero are better
    and scatter less."""
    up = (step + 1) / max(1, options.warmup)
    down = (steps - step) / max(1, options.decay * steps)
    return options.lr * min(1, up, down)


def train_step(policy, reference, optimizer, records, options, step, process, stop):
    """One optimizer step. Returns the metrics, averaged over all ranks, and whether the Event `stop` is set on any."""
    samples = list(enumerate(batch_indices(options, len(records), step)))
    mine = samples[process.rank::process.world_size]
    metrics = accumulate_gradients(policy, reference, records, mine, options, step, process.device)
    metrics["asked"] = torch.tensor(float(stop.is_set()), dtype=torch.float64, device=process.device)
    numbers = torch.stack(list(metrics.values())) / process.world_size
    dist.all_reduce(numbers)
    metrics = dict(zip(metrics, numbers.tolist()))
    asked = metrics.pop("asked") > 0
    metrics["grad_norm"] = torch.nn.utils.clip_grad_norm_(policy.parameters(), CLIP).full_tensor().item()
    check_health(metrics, options, step, [records.names[index] for _, index in samples])
    metrics["lr"] = learning_rate(options, step, number_of_steps(options, len(records)))
    optimizer.param_groups[0]["lr"] = metrics["lr"]
    optimizer.step()
    optimizer.zero_grad()
    if options.method in PREFERENCE and (step + 1) % options.ema_every == 0:
        ema_update(reference, policy, options.ema_decay)                                # shard by shard: no traffic
    return metrics, asked


def check_health(metrics, options, step, names):
    """Raise UserError if a number is not finite, before the optimizer can spoil the weights."""
    bad = [name for name, value in metrics.items() if not math.isfinite(value)]
    if bad:
        raise UserError(f"step {step}: {', '.join(bad)} not finite, records {' '.join(names)}; nothing was updated; "
                        f"last good checkpoint: {max(checkpoints(options), default='none')}; "
                        "go on from one with --resume, a lower --lr or --beta and another --out")


# ---- Looking at it: held-out records, videos, FLOP, the log ---------------------------------------------------------

EVAL_T = (0.1, 0.3, 0.5, 0.7, 0.9)
EVAL_RECORDS = 8                        # they take 4.1 % of the time of the 200 steps in between


@torch.no_grad()
def evaluate(policy, reference, records, options, process):
    """Preference loss, margin, accuracy and the four errors on the first held-out records, at fixed t and noise: their
    means over t, {"eval_margin": …}, and their values at each t, {"eval_margin_t0.1": …}."""
    options = dataclasses.replace(options, method="realdpo", graphs="all")
    sums = Counter()
    count = min(len(records), EVAL_RECORDS)
    for i in range(math.ceil(count / process.world_size)):             # the same number on all ranks: collectives
        number = process.rank + i * process.world_size
        index = number % count
        share = (number < count) / count                   # 0 for a record that only fills up the last round
        for t in EVAL_T:
            record = records[index] | {"t": torch.tensor(t)}
            record["noise"] = torch.randn(record["win"].shape, generator=generator("eval", records.names[index], t))
            batch = {name: tensor[None].to(process.device).float() for name, tensor in record.items()}
            for name, value in loss_of(policy, reference, batch, options)[1].items():
                sums[f"eval_{name}"] += value.double() * share / len(EVAL_T)
                sums[f"eval_{name}_t{t}"] += value.double() * share
    numbers = torch.stack(list(sums.values()))
    dist.all_reduce(numbers)
    return dict(zip(sums, numbers.tolist()))


def prepare_previews(options, process):
    """Encode the pictures and captions of --bench, before the networks to be trained take the memory. Returns this
    rank's prompts, their sample.Scenes and the contents of bench.json. Raises UserError if this run has videos of
    another bench."""
    settings = sample.Options(model=options.model, seed=options.seed, solver="multistep")
    for name, value in model.defaults_of(options.model, "sample").items():
        setattr(settings, name, value)
    prompts, bench = sample.read_bench(options.bench)
    made_by = sample.bench_settings(sample.settle(settings), bench)
    for note in Path(options.out).glob("videos/*/bench.json"):
        check_metadata(note, model.read_json(note), made_by)
    mine = prompts[process.rank::process.world_size]
    scenes = sample.Scenes(mine or prompts[:1], settings, process.device, process.dtype)
    scenes.vae.cpu()                                       # where it waits while steps run
    return mine, scenes, made_by


def make_previews(previews, policy, folder, process):
    """Make those of this rank's videos that `folder` lacks, from the same noise at every checkpoint. The policy's
    forward passes are collectives, so a rank with fewer videos left samples a stand-in to keep pace."""
    prompts, scenes, made_by = previews
    if process.rank == 0:
        write_json(folder / "bench.json", made_by)
    missing = [shot for shot in sample.shots_of(prompts, folder) if not shot.file.exists()]
    rounds = torch.tensor(len(missing), device=process.device)
    dist.all_reduce(rounds, dist.ReduceOp.MAX)
    stand_in = sample.Shot(None, scenes.prompts[0], 0)
    shots = missing + [stand_in] * (int(rounds) - len(missing))
    for shot in tqdm(shots, desc=f"videos of {folder.name}", leave=False, disable=process.rank > 0):
        latents = scenes.sample(policy, shot.prompt)
        if shot.file:
            scenes.write(latents, shot.file)
    scenes.vae.cpu()


def speed(work, setting, step, seconds, process):
    """Metrics of the speed of a step. mfu counts the FLOP of the algorithm, hfu also those done twice to save memory.
    """
    share = compares(work.options, step)
    useful, done = work.flops(setting, share)
    tokens = work.options.batch * work.videos_of(share) * work.tokens
    metrics = {"seconds": seconds, "tokens_per_second": tokens / seconds}
    gpu = torch.cuda.get_device_name() if process.device.type == "cuda" else ""
    for name, rate in PEAK.items():
        if name in gpu:
            peak = seconds * process.world_size * rate
            return metrics | {"mfu": useful / peak, "hfu": done / peak}
    return metrics


def console_line(step, metrics):
    """The most important metrics in one line of at most 100 columns; metrics.jsonl has them all."""
    line = f"step {step:4d}  loss {metrics['loss']:.3g}"
    if "ref_win" in metrics:                               # differences, since t and noise are the same on both sides
        line += (f"  win {metrics['win'] - metrics['ref_win']:+.1e}  lose {metrics['lose'] - metrics['ref_lose']:+.1e}"
                 f"  margin {metrics['margin']:.2f}  acc {metrics['accuracy']:.2f}")
    line += f"  lr {metrics['lr']:.0e}  {metrics['seconds']:.3g} s"
    if "mfu" in metrics:
        line += f"  mfu {metrics['mfu']:.0%}"
    if "eval_margin" in metrics:
        line += (f"\n  held out  preference {metrics['eval_preference']:.4f}  margin {metrics['eval_margin']:.3g}"
                 f"  acc {metrics['eval_accuracy']:.2f}")
    return line


def open_log(file, first):
    """Open metrics.jsonl for appending, without the lines of steps that will be done again."""
    lines = file.read_text().splitlines() if file.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]      # a killed run may leave half a line
    write_json(file, *[row for row in rows if row["step"] < first])
    return open(file, "a")


def log_step(file, step, metrics):
    """Print a line and append one to metrics.jsonl."""
    tqdm.write(console_line(step, metrics))
    if step == 0 and abs(metrics.get("preference", math.log(2)) - math.log(2)) > 1e-3:
        # Policy and reference have the same weights, but kernels may round differently, which β magnifies.
        tqdm.write(f"warning: the first preference loss is {metrics['preference']:.6f}, not log 2, though policy and "
                   "reference have the same weights: their forward passes round differently")
    try:
        file.write(json.dumps({"step": step, **metrics}) + "\n")
        file.flush()
    except OSError as e:
        raise UserError(f"{file.name}: cannot be written ({e}); make room, then start again") from e


# ---- Checkpoints: tensors only, in safetensors; a folder has its name only once it is whole -------------------------

def checkpoints(options):
    """The whole checkpoints under --out, oldest first."""
    return sorted((Path(options.out) / "checkpoints").glob("step-??????"))


def training_state(policy, reference, optimizer):
    """Everything that training changes, as one flat dict of (sharded) tensors."""
    state = {}
    for name, tensor in policy.net.state_dict().items():   # parameters, and the table of positions
        state[f"model.{name}"] = tensor
    for name, tensor in reference.net.state_dict().items():
        state[f"ref.{name}"] = tensor
    for name, p in policy.net.named_parameters():
        state[f"exp_avg.{name}"] = optimizer.state[p]["exp_avg"]
        state[f"exp_avg_sq.{name}"] = optimizer.state[p]["exp_avg_sq"]
    return state


def note_base(folder, options):
    """Write base.json into a folder with weights: the model that has the parts it lacks, such as the autoencoder."""
    base = Path(model.base_of(options.model))
    write_json(folder / "base.json", {"model": str(base.resolve() if base.is_dir() else base)})


def save_checkpoint(state, options, records, step, rank):
    """Write checkpoints/step-N, which is a model in itself, then delete all but the last KEEP."""
    folder = Path(options.out) / "checkpoints"
    part, final = folder / f"step-{step:06d}.part", folder / f"step-{step:06d}"
    if rank == 0:
        for left in folder.glob("step-*.*"):               # by runs that were killed while saving
            shutil.rmtree(left, ignore_errors=True)
        note_base(part, options)
        write_json(part / "records.json", records.hashes)
        write_json(part / "options.json", {"step": step, **dataclasses.asdict(options)})
    dist.barrier()
    files = {name: 1 + i // 200 for i, name in enumerate(state)}         # writing a file takes three times its size
    # One process needs no collectives; on a CPU, gloo's threads would make every later step 1.5 times as slow.
    writer = dcp.HuggingFaceStorageWriter(str(part), files, save_distributed=True)
    try:
        dcp.save(state, storage_writer=writer, no_dist=dist.get_world_size() == 1)
    except dcp.api.CheckpointException as e:
        shutil.rmtree(part, ignore_errors=True)
        raise UserError(f"{part}: cannot be written ({model.dcp_reason(e)!r}); "
                        "earlier checkpoints are whole: make room and start again") from None
    if rank == 0:
        model.replace_folder(part, final)
        for old in checkpoints(options)[:-KEEP]:
            shutil.rmtree(old, ignore_errors=True)         # if it is in use, the next save tries again
    dist.barrier()


# Options that may change when a run is continued: they decide where, how and how long it runs, not what a step does.
MAY_CHANGE = {"data", "out", "steps", "epochs", "save_every", "resume", "max_minutes", "checkpointing", "graphs",
              "micro_batch", "offload", "compile", "eval_data", "bench", "dry_run"}


def choose_checkpoint(options, process):
    """The checkpoint to continue from: the last in --out, else --resume, else None. Rank 0 chooses for all, since the
    others may have a stale view of a network file system."""
    newest = max(checkpoints(options), default=Path("step--1"))
    step = torch.tensor(int(newest.name.removeprefix("step-")), device=process.device)
    dist.broadcast(step, src=0)
    if step >= 0:
        return Path(options.out) / "checkpoints" / f"step-{int(step):06d}"
    return Path(options.resume) if options.resume else None


def check_checkpoint(folder, options, records):
    """The step of a checkpoint. Raises UserError if it lies in this --out but was made with other options or records,
    so that continuing would make another run of it."""
    saved = model.read_json(folder / "options.json")
    if folder.parent != Path(options.out) / "checkpoints":
        return saved["step"]
    different = [f"{flag(name)} {saved.get(name)} (now {value})" for name, value in dataclasses.asdict(options).items()
                 if name not in MAY_CHANGE and saved.get(name) != value]
    if different:
        raise UserError(f"{folder}: was made with {', '.join(different)}; use the same options or another --out")
    trained_on = model.read_json(folder / "records.json")
    for name in sorted({*trained_on, *records.hashes}):
        if trained_on.get(name) != records.hashes.get(name):
            changed = "has changed"
            if name not in records.hashes:
                changed = "is gone"
            elif name not in trained_on:
                changed = "is new"
            raise UserError(f"{records.folder}: record {name} {changed} since {folder} was written; give the same "
                            "records, or start another --out")
    check_schedule(folder, saved, options, len(records))
    return saved["step"]


def check_schedule(folder, saved, options, count):
    """Raise UserError if the number of steps was changed in a way that would have given earlier steps another learning
    rate: a continued run must equal one that was never interrupted."""
    planned = number_of_steps(dataclasses.replace(options, steps=saved["steps"], epochs=saved["epochs"]), count)
    steps = number_of_steps(options, count)
    last = saved["step"] - 1
    if learning_rate(options, last, planned) != learning_rate(options, last, steps):
        raise UserError(f"{folder}: the rate has begun to fall to zero at the end of {planned} steps (--decay "
                        f"{options.decay}), so they cannot become {steps} any more; keep their number, or go on from "
                        "here with --resume and another --out")


def load_checkpoint(state, optimizer, folder, step):
    """Read a checkpoint into the models and the optimizer. Raises UserError if it is not whole or of another model."""
    try:
        model.fill(state, folder)
    except UserError as e:
        raise UserError(f"{e}; delete {folder} to continue from an earlier checkpoint") from e
    for moments in optimizer.state.values():
        moments["step"].fill_(step)


# ---- Processes and sharding: the networks know nothing of it --------------------------------------------------------

LEAST_SHARDS = 8                        # if there are so many GPUs
TIMEOUT = timedelta(minutes=60)         # of a collective: the other ranks wait while rank 0 writes an export


def shards_of(world_size, ranks_a_machine):
    """Over how many ranks to shard parameters: those of one machine, if it has LEAST_SHARDS; else those of the fewest
    machines that together have as many and divide the world; else all."""
    shards = ranks_a_machine
    while shards < world_size and (shards < LEAST_SHARDS or world_size % shards):
        shards += ranks_a_machine
    return min(shards, world_size)


def make_mesh(device_type, world_size, ranks_a_machine):
    """The mesh of all ranks. Parameters are sharded within groups of neighbours and replicated across the groups, so
    that only gradients pass between them."""
    size = shards_of(world_size, ranks_a_machine)
    mesh = init_device_mesh(device_type, (world_size // size, size), mesh_dim_names=("replicate", "shard"))
    return mesh if world_size > size else mesh["shard"]


def init_distributed():
    """Join the process group; without torchrun, one of a single process. Returns this Process and the mesh."""
    process = this_process()
    cuda = process.device.type == "cuda"
    backend = "cuda:nccl,cpu:gloo" if cuda else "gloo"
    alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
    dist.init_process_group(backend, timeout=TIMEOUT, device_id=process.device if cuda else None, **alone)
    ranks_a_machine = int(os.environ.get("LOCAL_WORLD_SIZE", process.world_size))
    mesh = make_mesh(process.device.type, process.world_size, ranks_a_machine)
    for group in mesh.get_all_groups():
        group.set_timeout(TIMEOUT)                         # the mesh's groups do not inherit it
    return process, mesh


def shard(net, mesh, dtype, compile=False, offload=False):
    """Shard every block's parameters over the ranks (FSDP2). They are gathered in `dtype`; gradients are reduced in
    fp32. With `offload`, each rank's shard, its gradients and the optimizer's state stay in CPU memory."""
    precision = dict(param_dtype=dtype, reduce_dtype=torch.float32)
    where = dict(mesh=mesh, offload_policy=OffloadPolicy())
    if offload:
        where["offload_policy"] = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
    if compile:
        net.compile_blocks()
    for block in net.transformer_blocks:
        fully_shard(block, **where,
                    mp_policy=MixedPrecisionPolicy(**precision, cast_forward_inputs=False))    # rope stays fp32
    # Reshard the root too: else its parameters would stay gathered after a forward pass and hide the EMA's updates.
    fully_shard(net, **where, mp_policy=MixedPrecisionPolicy(**precision, output_dtype=torch.float32),
                reshard_after_forward=True)


def send_gradients(policy, last):
    """Tell FSDP whether the next backward passes are the `last` of a step. Only then do gradients cross the network
    between machines, and only then do they move to CPU memory, if the GPU can hold them until then."""
    if policy.holds_gradients:
        policy.net.set_requires_gradient_sync(last)
    policy.net.set_requires_all_reduce(last)


def load_models(options, process, mesh):
    """Policy and reference, sharded, in fp32; they compute in the process's dtype. Raises UserError unless all their
    shards are equal, bit for bit."""
    split = partial(shard, mesh=mesh, dtype=process.dtype, compile=options.compile, offload=options.offload)
    where = "cpu" if options.offload else process.device
    policy = model.load_dit(options.model, where, torch.float32, split)
    reference = model.load_dit(options.model, where, torch.float32, split)
    different = torch.zeros((), device=process.device)
    for p, r in zip(policy.parameters(), reference.parameters(), strict=True):
        different += not torch.equal(p.to_local(), r.to_local())
    dist.all_reduce(different)
    if different > 0:
        raise UserError(f"{different:.0f} shards of the reference are not the policy's; both must start from one model")
    policy.checkpointing = CHECKPOINTING[options.checkpointing]
    return policy.train(), reference.requires_grad_(False)


def make_optimizer(policy, options):
    """AdamW whose moments exist from the start, so that a checkpoint can be read into them."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=options.lr, betas=(0.9, 0.95),
                                  weight_decay=WEIGHT_DECAY, fused=True)
    for p in policy.parameters():
        optimizer.state[p] = dict(step=torch.zeros((), device=p.device),
                                  exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
    return optimizer


# ---- What it takes: memory and time, computed -----------------------------------------------------------------------

GIB = 2 ** 30
# Dense bf16 FLOP/s by a part of the GPU's name, of which the first match counts; and a GPU with so many GB.
PEAK = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H200 NVL": 835e12, "H100": 989e12, "H200": 989e12, "A100": 312e12,
        "L40S": 362e12, "4090": 165e12}
CARDS = {24: "4090", 48: "L40S", 80: "H100", 141: "H200"}
UTILISATION = 0.4                       # of that peak; others measured 38 % compiled and 30 % eager
COPY = 25e9                             # bytes a second between CPU and GPU
HOST = 80e9                             # bytes a second through a server's CPU memory
# How many activations of all tokens, in bf16, a block's graph keeps, and how many exist while the block is
# back-propagated. Counted on the real code with tensors without data; the tests hold `Work.memory` to it.
KEPT = {"none": 25, "full": 1, "selective": 2}
BACKWARD = 25


class Setting(NamedTuple):
    """What trades time for memory: three options, and whether, with `offload`, the GPU holds gradients until the end
    of a step."""
    offload: bool
    checkpointing: str
    graphs: str
    held: bool


class Work:
    """What a step costs. `config` is the transformer's, `shape` the latents' (C,F,H,W), `n_lose` the number of
    negatives a record. A `share` of 1 stands for a step that compares, 0 for one that does not; by default it is the
    share of steps that do, which gives the mean step."""

    def __init__(self, options, config, shape, n_lose):
        drawn = min(n_lose, options.lose_per_step or n_lose)
        self.videos = {"realdpo": 1 + drawn, "sft": 1, "dpo": 2, "rwr": n_lose}[options.method]      # of a sample
        self.share = 1 / options.compare_every if options.method == "realdpo" else 1
        self.options = options
        self.compared = options.method in PREFERENCE
        self.layers = config["num_layers"]
        self.products, self.attention, self.tokens = model.forward_flops(config, shape[1:])
        self.forward = self.products + self.attention      # FLOP of one video
        width = config["num_attention_heads"] * config["attention_head_dim"]
        self.activation = 2 * self.tokens * width * options.micro_batch                 # bytes of one, of all tokens
        with torch.device("meta"):
            self.parameters = sum(p.numel() for p in model.DiT(config).parameters())

    def videos_of(self, share):
        """How many videos of a sample a step looks at."""
        return share * self.videos + (1 - share)           # without a comparison, the win alone

    def flops(self, setting, share=None):
        """FLOP of a step over all ranks: those of the algorithm, and with those done twice to save memory."""
        share = self.share if share is None else share
        again = {"none": 0, "full": self.forward, "selective": self.products}[setting.checkpointing]
        policy, reference = self.videos_of(share), share * self.compared * self.videos
        useful = (3 * policy + reference) * self.forward   # backward is twice forward
        done = useful + policy * again
        if self.compared and setting.graphs == "one":
            done += share * self.forward                   # the win's error, before its graph
        return self.options.batch * useful, self.options.batch * done

    def memory(self, setting, shards):
        """{kind: bytes} on a GPU at a step's peak, with parameters sharded over so many GPUs."""
        at_once = graphs = self.videos
        if self.compared and setting.graphs != "all":
            at_once, graphs = 1, {"one": 1, "two": 2}[setting.graphs]
        part = 0 if setting.offload else 4 * self.parameters // shards
        return {"parameters": part, "gradients": 4 * self.parameters if setting.held else part,
                "Adam": 2 * part, "reference": part,
                "graphs": graphs * self.layers * KEPT[setting.checkpointing] * self.activation,
                "a block's backward pass": at_once * BACKWARD * self.activation,
                "gathered blocks": 14 * self.parameters // self.layers,
                "context, NCCL, fragments (guessed)": (2 if shards == 1 else 5) * GIB}

    def host_memory(self, shards, gpus):
        """Bytes of CPU memory that --offload takes on a machine with so many GPUs, for parameters, gradients, Adam's
        moments and the reference."""
        return 20 * self.parameters // shards * gpus

    def seconds(self, setting, gpus, shards, rate):
        """Seconds of a step on GPUs of `rate` FLOP/s. With --offload, add copies and the CPU's work."""
        seconds = self.flops(setting)[1] / (gpus * rate * UTILISATION)
        if not setting.offload:
            return seconds
        part = 4 * self.parameters / shards
        samples = self.options.batch / gpus
        backwards = 1 if setting.graphs == "all" else self.videos_of(self.share)
        references = self.share * self.compared * (1 if setting.graphs == "all" else self.videos)
        passes = 2 * backwards + references + self.share * (setting.graphs == "one")    # each moves all weights
        sums = 0 if setting.held else samples * backwards              # gradients copied out and added on the CPU
        copied = (samples * passes + sums) * part
        touched = (3 * sums + 13) * part                   # 3 a sum; AdamW 7, clipping 3, the EMA 3
        return seconds + copied / COPY + touched / HOST

    def fitting(self, settings, room, gpus, shards, rate):
        """[(seconds a step, Setting)] of the settings that fit `room` bytes of a GPU, the fastest first."""
        found = []
        for setting in settings:
            if sum(self.memory(setting, shards).values()) <= room:
                found.append((self.seconds(setting, gpus, shards, rate), setting))
        return sorted(found, key=itemgetter(0))


def choose_setting(work, options, process, mesh):
    """The Setting of a run: what the options say, and what they leave open, the fastest that fits the GPU. Raises
    UserError if nothing fits, before anything is loaded."""
    shards = mesh.size(-1)
    room = math.inf
    if process.device.type == "cuda":
        room = torch.cuda.get_device_properties(process.device).total_memory
    if options.offload:
        here = int(os.environ.get("LOCAL_WORLD_SIZE", process.world_size))
        needed = work.host_memory(shards, here)
        free = data.free_host_memory()
        if needed > free:
            raise UserError(f"--offload: {here} processes take {needed / GIB:.0f} GiB of this machine's memory, of "
                            f"which {free / GIB:.0f} are free; use more machines, or GPUs without --offload")
    ways = [options.graphs] if options.graphs else ["all", "two", "one"]
    held = [True, False] if options.offload and process.device.type == "cuda" else [False]
    settings = [Setting(options.offload, options.checkpointing, *way) for way in product(ways, held)]
    fitting = work.fitting(settings, room, process.world_size, shards, PEAK["H100"])
    if not fitting:
        least = min(sum(work.memory(setting, shards).values()) for setting in settings)
        raise UserError(f"a step takes {least / GIB:.0f} GiB on each GPU, which has {room / GIB:.0f}; "
                        f"python train.py --dry-run {process.world_size} lists what fits")
    return fitting[0][1]


def dry_run(options, clips=5000, n_lose=3):
    """Print which settings fit GPUs of each kind, the fastest first, and how long a run takes."""
    config = model.PUBLISHED_DIT if options.model == data.HUB_MODEL else model.read_dit_config(options.model)
    frames = (config["sample_frames"] - 1) // config["temporal_compression_ratio"] + 1
    shape = (config["out_channels"], frames, config["sample_height"], config["sample_width"])
    check_options(options, 1)
    work = Work(options, config, shape, n_lose)
    steps = number_of_steps(options, clips)
    without = product([False], ["selective", "full"], ["all", "two", "one"], [False])
    offload = product([True], ["selective", "full"], ["all", "two", "one"], [True, False])
    settings = [Setting(*each) for each in [*without, *offload]]
    between = options.save_every * work.flops(settings[1])[1]          # FLOP of the steps between two checkpoints
    look = EVAL_RECORDS * len(EVAL_T) * 2 * (1 + n_lose) * work.forward
    video = 25 * 2 * work.forward
    print(f"computed, not measured, at {UTILISATION:.0%} of a GPU's peak: {work.parameters:,} parameters, "
          f"{work.videos} videos a sample, {work.tokens:,} tokens a video; of the time of {options.save_every} steps, "
          f"a look at {EVAL_RECORDS} held-out records takes {look / between:.1%}, a video of --bench "
          f"{video / between:.2%}\n{'GPUs':>9}  {'GiB':>5}  {'host':>5}  "
          f"{'s/step':>6}  {'h/1000 samples':>14}  {f'h/{steps} steps':>12}  {'h, negatives':>12}  options")
    for place in options.dry_run:
        machines, here = machines_and_gpus(place)
        gpus = machines * here
        shards = shards_of(machines * here, here)
        check_options(options, gpus)
        for memory, card in CARDS.items():
            sampling = clips * n_lose * 25 * 2 * work.forward / (gpus * PEAK[card] * UTILISATION)
            for seconds, setting in work.fitting(settings, 0.97 * memory * GIB, gpus, shards, PEAK[card])[:3]:
                gib = sum(work.memory(setting, shards).values()) / GIB
                words = f"--checkpointing {setting.checkpointing} --graphs {setting.graphs}"
                host = 0
                if setting.offload:
                    words = f"--offload {words}"
                    host = work.host_memory(shards, here) / GIB
                print(f"{place:>4} × {memory:<3} {gib:5.1f}  {host:5.0f}  {seconds:6.1f}  "
                      f"{1000 * seconds / options.batch / 3600:14.1f}  {steps * seconds / 3600:12.1f}  "
                      f"{sampling / 3600:12.1f}  {words}")


def machines_and_gpus(text):
    """(2, 8) of "2x8", (1, 4) of "4". Raises UserError for anything else."""
    found = re.fullmatch(r"(?:([1-9]\d*)x)?([1-9]\d*)", text)
    if not found:
        raise UserError(f"--dry-run {text}: expected a number of GPUs, such as 8, or of machines and GPUs, such as 2x8")
    return int(found[1] or 1), int(found[2])


# ---- The run --------------------------------------------------------------------------------------------------------

def number_of_steps(options, count):
    """The number of training steps: those of --epochs over `count` records; else --steps; else the paper's ten epochs.
    """
    if options.steps and not options.epochs:
        return options.steps
    return math.ceil((options.epochs or 10) * count / options.batch)


def check_options(options, world_size):
    """Raise UserError for options that contradict each other or the number of processes."""
    least = dict(batch=1, micro_batch=1, ema_every=1, compare_every=1, save_every=1, epochs=0, steps=0, lose_per_step=0)
    for name, smallest in least.items():
        if getattr(options, name) < smallest:
            raise UserError(f"{flag(name)} {getattr(options, name)}: expected at least {smallest}")
    if options.batch % world_size:
        raise UserError(f"--batch {options.batch}: expected a multiple of the {world_size} processes")
    share = options.batch // world_size
    if share % min(options.micro_batch, share):
        raise UserError(f"--micro-batch {options.micro_batch}: does not divide the {share} samples that each of the "
                        f"{world_size} processes takes of --batch {options.batch}")
    if not 0 <= options.decay <= 1:
        raise UserError(f"--decay {options.decay}: expected 0 to 1, a part of the steps")
    if options.method == "realdpo" and options.compare_every > 1 and options.anchor <= 0:
        raise UserError(f"--compare-every {options.compare_every} needs an --anchor: nothing else trains between two "
                        "comparisons")


def read_records(options, config):
    """The records to train on, and the held-out ones or None. Raises UserError for records of another model than that
    of `config`, or with fewer negatives than a step draws."""
    records = Records(options.data, negatives=options.method != "sft", scores=options.method in SCORED)
    held_out = Records(options.eval_data) if options.eval_data else None
    expected = config["out_channels"], config["max_text_seq_length"], config["text_embed_dim"]
    for each in filter(None, (records, held_out)):
        shapes = {name: tuple(tensor.shape) for name, tensor in each[0].items()}
        found = shapes["win"][0], *shapes["text"]
        if found != expected:
            raise UserError(f"{each.folder}: (channels, tokens, text width) are {found}, this model's {expected}; "
                            "encode the videos with the model to be trained")
    n_lose = len(records[0].get("lose", ()))
    if options.method == "realdpo" and options.lose_per_step > n_lose:
        raise UserError(f"--lose-per-step {options.lose_per_step}: the records of {options.data} have {n_lose}")
    return records, held_out


@contextmanager
def stop_signals():
    """Yield an Event that is set when this process shall finish its step, save and exit: by SIGTERM (pre-emption;
    launchers repeat it), by SIGUSR1 or SIGUSR2 (SLURM's --signal) or by Ctrl-C. A second Ctrl-C ends it at once."""
    stop = threading.Event()
    before = {}

    def finish_step(number, _):
        stop.set()
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2"):
        if hasattr(signal, name):                          # Windows has the first two
            number = getattr(signal, name)
            before[number] = signal.signal(number, finish_step)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(options, process, mesh):
    """Train until all steps are done or someone asks to stop, with checkpoints on the way; at the end write the trained
    transformer. Returns whether training is complete."""
    begin = time.time()
    main_rank = process.rank == 0
    out = Path(options.out)
    check_options(options, process.world_size)
    config = model.read_dit_config(options.model)
    records, held_out = read_records(options, config)
    checkpoint = choose_checkpoint(options, process)
    first = 0
    if checkpoint:                                         # refuse what is wrong before anything is loaded
        first = check_checkpoint(checkpoint, options, records)
        data.say(f"continuing from {checkpoint}")
    record = records[0]
    work = Work(options, config, record["win"].shape, len(record.get("lose", ())))
    setting = choose_setting(work, options, process, mesh)
    options.graphs = setting.graphs
    previews = prepare_previews(options, process) if options.bench else None
    policy, reference = load_models(options, process, mesh)
    optimizer = make_optimizer(policy, options)
    state = training_state(policy, reference, optimizer)
    if checkpoint:
        load_checkpoint(state, optimizer, checkpoint, first)
    steps = number_of_steps(options, len(records))
    policy.holds_gradients = setting.held
    log = open_log(out / "metrics.jsonl", first) if main_rank else None
    bar = tqdm(range(first, steps), initial=first, total=steps, desc=options.out, disable=not main_rank)
    with stop_signals() as stop:
        if previews and is_due(options, first, steps):     # of the base, or those a killed run did not finish
            make_previews(previews, policy, out / "videos" / f"step-{first:06d}", process)
        for step in bar:
            tick = time.time()
            if options.max_minutes and tick - begin > 60 * options.max_minutes:
                stop.set()
            metrics, asked = train_step(policy, reference, optimizer, records, options, step, process, stop)
            metrics |= speed(work, setting, step, time.time() - tick, process)
            done = step + 1
            due = is_due(options, done, steps)
            if held_out and due:
                metrics |= evaluate(policy, reference, held_out, options, process)
            if main_rank:
                log_step(log, step, metrics)
            if asked or due:
                save_checkpoint(state, options, records, done, process.rank)
            if asked and done < steps:
                bar.close()                                # so that the message is the last line
                data.say(f"stopped after {done} steps; checkpoint saved in {options.out}/checkpoints, "
                         "and the same command continues")
                return False
            if previews and due:
                make_previews(previews, policy, out / "videos" / f"step-{done:06d}", process)
    model.save_dit(policy, out, torch.bfloat16)            # the precision in which it will run
    if main_rank:
        note_base(out, options)
    return True


def is_due(options, done, steps):
    """Whether a checkpoint, the held-out records and videos are due after `done` steps."""
    return done == steps or done % options.save_every == 0


# ---- The command ----------------------------------------------------------------------------------------------------

def main(options):
    """Train on a cache of records; without one, with the tiny model, go through the whole story on the toy world."""
    if options.dry_run:
        return dry_run(options)
    toy = options.model == "tiny" and not options.data
    options.out = options.out or ("run-tiny" if options.model == "tiny" else "run")
    options.data = options.data or "cache"
    if not toy and not Path(options.data).is_dir():
        cache, name = quote(options.data), quote(options.model)
        raise UserError(f"--data {options.data}: no such cache; "
                        f"make it with: python data.py --videos DIR --model {name} --out {cache}"
                        f" and: python sample.py --model {name} --data {cache}; "
                        "or watch it on the toy world: python train.py --model tiny")
    if options.offload:                                    # pin memory in the sizes needed, not in powers of two
        settings = os.environ.get("PYTORCH_ALLOC_CONF", "").split(",") + ["pinned_max_round_threshold_mb:1"]
        os.environ["PYTORCH_ALLOC_CONF"] = ",".join(filter(None, settings))
    process, mesh = init_distributed()
    with data.sole_owner(Path(options.out)) if process.rank == 0 else nullcontext():
        if toy:
            from toy import laptop
            laptop.run(options, process, partial(train, process=process, mesh=mesh))
        elif train(options, process, mesh) and process.rank == 0:
            print(f"done: {options.out} holds the model and metrics.jsonl; try: python sample.py --model "
                  f"{quote(options.out)} --image first.png --prompt \"…\"")
    dist.destroy_process_group()


if __name__ == "__main__":
    data.command(main, Options, "train")
