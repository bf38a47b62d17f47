"""RealDPO, the training run: one code path for a laptop, two CPU processes, one GPU, eight, and several machines.

    python train.py                                                    laptop: everything, on the tiny model, in minutes
    python train.py --model MODEL --data CACHE --out RUN               one process
    torchrun --nproc_per_node 8 train.py                               CogVideoX-5B-I2V on the records in cache/

RUN then holds transformer/ (opens here, with --model RUN, and in diffusers), metrics.jsonl, checkpoints/ and, with
--bench, videos/; RUN/done says that it has ended. The same command continues an interrupted run from its last
checkpoint.
"""
import dataclasses, json, math, os, shutil, warnings
from collections import Counter
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from shlex import quote
from time import time
from typing import Literal

from support import UserError, files, folders
from support.budget import dry_run
from support.command import changed, command, flags, generator, option, say, stop_signals, this_process
from support.lists import read_bench
from support.page import update_page
from support.weights import fill
import model
import sample
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from tqdm import tqdm

from data import Records
from realdpo import (Condition, best_and_worst, denoising_errors, ema_update, local, preference_loss, realdpo_loss,
                     rwr_loss, sft_loss, streamed_realdpo_loss)

@dataclasses.dataclass
class Options:
    """Align an image-to-video transformer with real videos."""
    model: str = option("", "model folder, hub id, run or tiny; default: 5B-I2V with a GPU, else tiny", "files")
    data: str = option("", "cache of records, from data.py and sample.py; default: cache, and for tiny a toy world's")
    out: str = option("", "folder for the trained transformer, checkpoints and logs; default: run, for tiny run-tiny")
    resume: str = option("", "a checkpoint of another run to start from; its options may differ")
    method: Literal["realdpo", "sft", "dpo", "rwr"] = option("realdpo", "dpo and rwr: on scored negatives", "the loss")
    beta: float = option(5000.0, "strength of the preference, on the mean squared error (release: 5000)")
    anchor: float = option(2000.0, "weight of the win error added to the loss (paper: 0, see README)")
    weighting: Literal["x0", "velocity"] = option("x0", "weight of the error at t: x0: 1 (App. C), velocity: 1/t²")
    t_draw: Literal["uniform", "release"] = option("release", "noise level t: uniform (paper); release: up to 0.64")
    lose_per_step: int = option(1, "negatives drawn per sample and step, for realdpo; 0: all (paper: 3)", least=0)
    compare_every: int = option(4, "realdpo: steps between comparisons, where the anchor trains (paper: 1)", least=1)
    ema_decay: float = option(0.996, "ω of the reference (Eq. 7, paper: 0.996, release: 0.999); 1: frozen")
    ema_every: int = option(1, "steps between two updates of the reference (paper: not given; release: 100)", least=1)
    lr: float = option(1e-5, "learning rate after warm-up (paper: 1e-5; release: 1e-6)", "the optimizer")
    warmup: int = option(20, "steps of linear warm-up (release: 100)")
    decay: float = option(0.5, "part of the steps, at the end, over which the rate falls to zero (paper: 0)")
    steps: int = option(0, "training steps; default: ten passes over the records (paper)", least=0)
    batch: int = option(8, "samples per step over all GPUs (paper: 8); each a win with its lose", least=1)
    micro_batch: int = option(1, "samples a GPU takes at once, at most", "the hardware", least=1)
    checkpointing: Literal["none", "full", "selective"] = option("selective", "what backward computes again")
    graphs: Literal["all", "two", "one"] = option("two", "graphs alive at a time: fewer take less memory")
    rank: int = option(0, "train adapters of this rank on a frozen base, for one card; 0: the whole network", least=0)
    compile: bool = option(False, "torch.compile each block")
    dry_run: int = option(0, "only compute the memory and hours of a run on so many GPUs, eight a machine", least=0)
    save_every: int = option(200, "steps between checkpoints, held-out figures and videos", "the run", least=1)
    eval_data: str = option("", "cache of held-out records with negatives; the first 8 are looked at")
    bench: str = option("", "folder of pictures with captions, of which to make videos at every checkpoint")
    seed: int = option(0, "seed of order, noise, t and drawn negatives")

WEIGHT_DECAY, CLIP = 1e-4, 1.0          # of AdamW; the largest gradient norm. The paper gives neither
PREFERENCE = ("realdpo", "dpo")         # the methods that compare with a reference
SCORED = ("dpo", "rwr")                 # the methods that learn from scored generated videos, not from real ones
CHECKPOINTING = {"none": False, "full": True, "selective": "selective"}
KEEP = 2                                # checkpoints
# The noise levels of CogVideoX's first 500 training steps, of 1000. The release draws one of them; few are small.
RELEASE_T = model.VPrediction(dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012,
                                   snr_shift_scale=1.0)).t[:500].float()


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
    the release draws it, or uniformly from (t_min, 1]; below t_min the network was never trained."""
    rng = generator("train", options.seed, step, place)
    u = torch.rand((), generator=rng)
    if options.t_draw == "release":
        record["t"] = RELEASE_T[int(u * len(RELEASE_T))]
    else:
        record["t"] = t_min + (1 - t_min) * (1 - u)
    record["noise"] = torch.randn(record["win"].shape, generator=rng)
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
    a time. Returns the mean metrics, and this rank's shards of the mean gradients."""
    size = math.gcd(options.micro_batch, len(samples))     # equally large, so their mean gradient is the batch's
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
        policy.net.set_requires_all_reduce(False)          # between machines, gradients travel once a step
        loss, metrics = loss_of(policy, reference, batch, options)
        policy.net.set_requires_all_reduce(part == parts - 1)
        loss.backward()
        for name, value in {"loss": loss.detach(), **metrics}.items():
            total[name] += value.double() / parts
    gradients = local(p.grad for p in policy.parameters())
    if parts > 1:
        torch._foreach_div_(gradients, parts)
    return dict(total), gradients

def learning_rate(options, step, steps):
    """The learning rate at a step of a run of `steps`: it rises over --warmup and falls to zero over the last part,
    --decay, of the steps. With a constant rate, the last iterate is noisy: on the toy, runs that end at zero are better
    and scatter less."""
    up = (step + 1) / max(1, options.warmup)
    down = (steps - step) / max(1, options.decay * steps)
    return options.lr * min(1, up, down)

def train_step(policy, reference, optimizer, records, options, step, process, mesh, stop):
    """One optimizer step. Returns the metrics, averaged over all ranks, and whether the Event `stop` is set on any."""
    samples = list(enumerate(batch_indices(options, len(records), step)))
    mine = samples[process.rank::process.world_size]
    metrics, gradients = accumulate_gradients(policy, reference, records, mine, options, step, process.device)
    metrics["asked"] = torch.tensor(float(stop.is_set()), dtype=torch.float64, device=process.device)
    numbers = torch.stack(list(metrics.values())) / process.world_size
    dist.all_reduce(numbers)
    metrics = dict(zip(metrics, numbers.tolist()))
    asked = metrics.pop("asked") > 0
    norm = torch.nn.utils.get_total_norm(gradients)        # of this rank's shards, then of all
    norms = [torch.empty_like(norm) for _ in range(mesh["shard"].size())]
    dist.all_gather(norms, norm, group=mesh.get_group("shard"))
    norm = torch.linalg.vector_norm(torch.stack(norms))
    metrics["grad_norm"] = norm.item()
    bad = [name for name, value in metrics.items() if not math.isfinite(value)]
    if bad:                                                # before the optimizer can spoil the weights
        names = [records.names[index] for _, index in samples]
        raise UserError(f"step {step}: {', '.join(bad)} not finite, records {' '.join(names)}; nothing was updated; "
                        f"last good checkpoint: {max(folders.checkpoints_of(options.out), default='none')}; go on from "
                        "one with --resume, a lower --lr or --beta and another --out")
    metrics["lr"] = learning_rate(options, step, number_of_steps(options, len(records)))
    group = optimizer.param_groups[0]
    group["lr"] = metrics["lr"]
    for shard, gradient in zip(group["params"], gradients, strict=True):
        shard.grad = gradient
    torch.nn.utils.clip_grads_with_norm_(group["params"], CLIP, norm)
    optimizer.step()
    optimizer.zero_grad()
    policy.zero_grad()
    if options.method in PREFERENCE and (step + 1) % options.ema_every == 0:
        ema_update(reference, policy, options.ema_decay)                                # shard by shard: no traffic
    return metrics, asked


# ---- Looking at it: held-out records, videos, the log ---------------------------------------------------------------

EVAL_T = (0.1, 0.3, 0.5, 0.7, 0.9)
EVAL_RECORDS = 8                        # they take 4.1 % of the time of the 200 steps in between

@torch.no_grad()
def evaluate(policy, reference, records, options, process):
    """Preference loss, margin, accuracy and the four errors on the first held-out records, at fixed t and noise: their
    means over t, {"eval_margin": …}, and their values at each t, {"eval_margin_t0.1": …}. One video at a time."""
    sums = Counter()
    count = min(len(records), EVAL_RECORDS)
    for i in range(math.ceil(count / process.world_size)):             # the same number on all ranks: collectives
        number = process.rank + i * process.world_size
        share = 1 / count if number < count else 0         # of a record that only fills up the last round
        record = {name: tensor[None].to(process.device).float() for name, tensor in records[number % count].items()}
        videos = [record["win"][:, None], *record["lose"].split(1, dim=1)]
        for t in EVAL_T:
            rng = generator("eval", records.names[number % count], t)
            given = dict(cond=Condition(record["text"], record["image"]), t=torch.tensor([t], device=process.device),
                         noise=torch.randn(record["win"].shape, generator=rng).to(process.device))
            errors = []
            for denoiser in (policy, reference):
                look = partial(denoising_errors, denoiser, weighting=options.weighting, **given)
                win, *lose = [look(video) for video in videos]
                errors += [win, torch.cat(lose, dim=1)]
            for name, value in preference_loss(*errors, options.beta)[1].items():
                sums[f"eval_{name}"] += value.double() * share / len(EVAL_T)
                sums[f"eval_{name}_t{t}"] += value.double() * share
    numbers = torch.stack(list(sums.values()))
    dist.all_reduce(numbers)
    return dict(zip(sums, numbers.tolist()))

def over_ranks(number, process):
    """The greatest of all ranks' numbers, which are integers or truth values."""
    number = torch.tensor(int(number), device=process.device)
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return number.item()

class Previews:
    """Videos of the pictures of --bench, made by the policy at every checkpoint, from the same noise."""

    def __init__(self, options, process):
        """Encode pictures and captions, before the networks to be trained take the memory."""
        settings = sample.Options(model=options.model, seed=options.seed, solver="multistep")
        settings = sample.settle(dataclasses.replace(settings, **folders.defaults_of(options.model, "sample")))
        self.folder, self.process = Path(options.out) / "videos", process
        prompts, bench = read_bench(options.bench)
        captions = {prompt.name: prompt.caption for prompt in prompts}
        files.claim(self.folder / "bench.json", files.visible(self.folder, "step-*"), captions=captions,
                    **sample.bench_settings(settings, bench))                                   # a run has one bench
        # The policy's forward passes are collectives: every rank makes as many videos, if need be those of others.
        places = range(process.rank, process.rank + len(prompts), process.world_size)
        mine = [prompts[place % len(prompts)] for place in places]
        self.scenes = sample.Scenes(mine, settings, process.device, process.dtype)
        self.scenes.vae.cpu()                              # where it waits while steps run

    def make(self, policy, step, stop):
        """Make the videos that the folder of a step lacks. Returns whether the Event `stop` was set on any rank."""
        folder = self.folder / f"step-{step:06d}"
        asked = False
        for prompt in tqdm(self.scenes.prompts, f"videos of {folder.name}", leave=False, disable=self.process.rank > 0):
            file = folder / f"{prompt.name}.mp4"
            if over_ranks(not file.exists(), self.process):
                self.scenes.write(self.scenes.sample(policy, prompt), file)
            asked = over_ranks(stop.is_set(), self.process)
            if asked:
                break
        self.scenes.vae.cpu()
        return asked

def log_step(file, step, metrics):
    """Append all metrics to metrics.jsonl, and print the most important ones in a line of at most 100 columns."""
    line = f"step {step:4d}  loss {metrics['loss']:.3g}"
    if "ref_win" in metrics:                               # differences, since t and noise are the same on both sides
        line += (f"  win {metrics['win'] - metrics['ref_win']:+.1e}  lose {metrics['lose'] - metrics['ref_lose']:+.1e}"
                 f"  margin {metrics['margin']:.2f}  acc {metrics['accuracy']:.2f}")
    line += f"  lr {metrics['lr']:.0e}  {metrics['seconds']:.3g} s"
    if "eval_margin" in metrics:
        line += (f"\n  held out  preference {metrics['eval_preference']:.4f}  margin {metrics['eval_margin']:.3g}"
                 f"  acc {metrics['eval_accuracy']:.2f}")
    tqdm.write(line)
    with files.writing(file.name):
        file.write(json.dumps({"step": step, **metrics}) + "\n")
        file.flush()


# ---- Checkpoints: tensors only, in safetensors; a folder has its name only once it is whole -------------------------

def training_state(policy, reference, optimizer):
    """Everything that training changes, as one flat dict of (sharded) tensors."""
    state = {}
    for kind, denoiser in (("model", policy), ("ref", reference)):
        for name, tensor in denoiser.own(denoiser.net.state_dict().items()):   # parameters, and the table of positions
            state[f"{kind}.{name}"] = tensor
    for (name, _), moments in zip(policy.named_parameters(), optimizer.moments, strict=True):
        state[f"exp_avg.{name}"], state[f"exp_avg_sq.{name}"] = moments
    return state

def save_checkpoint(state, options, base, step, rank):
    """Write checkpoints/step-N, which is a model in itself, then delete all but the last KEEP."""
    folder = Path(options.out) / "checkpoints" / f"step-{step:06d}"
    part = folder.with_name(folder.name + files.MARK)
    if rank == 0:
        shutil.rmtree(part, ignore_errors=True)            # of a run that was killed while saving
        folders.note_base(part, options.model, options.rank)
        files.write_json(part / "checkpoint.json", {"step": step, "base": base, **dataclasses.asdict(options)})
    dist.barrier()
    parts = {name: 1 + i // 200 for i, name in enumerate(state)}         # writing a file takes three times its size
    # One process needs no collectives; on a CPU, gloo's threads would make every later step 1.5 times as slow.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    writer = dcp.HuggingFaceStorageWriter(str(part), parts, save_distributed=True)
    with files.writing(part):
        try:
            dcp.save(state, storage_writer=writer, no_dist=dist.get_world_size() == 1)
        except dcp.api.CheckpointException as e:
            shutil.rmtree(part, ignore_errors=True)
            raise next(iter(e.failures.values()))[0] from None
    if rank == 0:
        part.rename(folder)
        for old in folders.checkpoints_of(options.out)[:-KEEP]:
            shutil.rmtree(old, ignore_errors=True)         # if it is in use, the next save tries again
    dist.barrier()


# ---- Processes and sharding: the networks know nothing of it --------------------------------------------------------

def make_mesh(device_type, world_size, ranks_a_machine):
    """The mesh of all ranks: parameters are sharded over all of them or, on machines of eight GPUs or more, within each
    machine, and replicated between machines, so that only gradients pass between them."""
    size = ranks_a_machine if ranks_a_machine >= 8 else world_size
    mesh = init_device_mesh(device_type, (world_size // size, size), mesh_dim_names=("replicate", "shard"))
    return mesh if world_size > size else mesh["shard"]

def init_distributed():
    """Join the process group; without torchrun, one of a single process. Returns this Process and the mesh."""
    process = this_process()
    cuda = process.device.type == "cuda"
    backend = "cuda:nccl,cpu:gloo" if cuda else "gloo"
    alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
    dist.init_process_group(backend, device_id=process.device if cuda else None, **alone)
    ranks_a_machine = int(os.environ.get("LOCAL_WORLD_SIZE", process.world_size))
    return process, make_mesh(process.device.type, process.world_size, ranks_a_machine)

def shard(net, mesh, dtype):
    """Shard every block's parameters over the ranks (FSDP2). They are gathered in `dtype`; gradients are reduced in
    fp32."""
    precision = dict(param_dtype=dtype, reduce_dtype=torch.float32)
    for block in net.transformer_blocks:
        fully_shard(block, mesh=mesh,
                    mp_policy=MixedPrecisionPolicy(**precision, cast_forward_inputs=False))    # rope stays fp32
    # Reshard the root too: else its parameters would stay gathered after a forward pass and hide the EMA's updates.
    fully_shard(net, mesh=mesh, mp_policy=MixedPrecisionPolicy(**precision, output_dtype=torch.float32),
                reshard_after_forward=True)

def load_models(options, process, mesh):
    """Policy and reference, sharded, what is trained in fp32; they compute in the process's dtype."""
    load = partial(model.load_dit, options.model, process.device, compile=options.compile,
                   shard=partial(shard, mesh=mesh, dtype=process.dtype))
    if options.rank:                                       # both on one frozen base
        policy, reference = load(dtype=process.dtype, rank=options.rank)
    else:
        policy, reference = load(), load()
    policy.checkpointing = CHECKPOINTING[options.checkpointing]
    return policy.train(), reference.requires_grad_(False)

@torch.no_grad()
def make_optimizer(policy, options):
    """AdamW on this rank's shards, as plain tensors: FSDP's sharded ones would take 0.1 s a step more, in Python alone.
    Its moments exist from the start, so that a checkpoint can be read into them."""
    parameters = list(policy.parameters())
    optimizer = torch.optim.AdamW(local(parameters), lr=options.lr, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY,
                                  fused=True)
    optimizer.moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]      # sharded, for checkpoints
    for shard, moments in zip(optimizer.param_groups[0]["params"], optimizer.moments):
        exp_avg, exp_avg_sq = local(moments)
        optimizer.state[shard] = dict(step=torch.zeros((), device=shard.device), exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    return optimizer


# ---- The run --------------------------------------------------------------------------------------------------------

def number_of_steps(options, count):
    """The number of training steps: --steps, else the paper's ten passes over `count` records."""
    return options.steps or math.ceil(10 * count / options.batch)

def is_due(options, done, steps):
    """Whether a checkpoint, the held-out records and videos are due after `done` steps."""
    return done == steps or done % options.save_every == 0

def read_records(options):
    """The records to train on, and the held-out ones or None. Raises UserError for records of another autoencoder than
    the model's, or with fewer negatives than a step draws."""
    records = Records(options.data, negatives=options.method != "sft", scores=options.method in SCORED)
    held_out = Records(options.eval_data) if options.eval_data else None
    vae = folders.fingerprint_of(options.model, "vae")
    for each in filter(None, (records, held_out)):
        files.check_same(each.folder / "win", each.settings, dict(vae=vae))
    n_lose = records.shapes.get("lose", (0,))[0]
    needed = {"realdpo": options.lose_per_step, "sft": 0, "dpo": 2, "rwr": 2}[options.method]
    if n_lose < needed:
        raise UserError(f"--method {options.method} --lose-per-step {options.lose_per_step}: needs {needed} negatives "
                        f"a record, those of {options.data} have {n_lose}")
    return records, held_out

def starting_point(options, process):
    """(checkpoint or None, steps done) from which a run goes on: the same on all ranks, of which one may have a stale
    view of a network file system."""
    checkpoint, done = folders.choose_checkpoint(options.out, options.resume)
    newest = over_ranks(done, process)
    if newest > done:
        checkpoint = Path(options.out) / "checkpoints" / f"step-{newest:06d}"
    return checkpoint, newest

def train(options, process, mesh):
    """Train until all steps are done or someone asks to stop, with checkpoints on the way; at the end write the trained
    transformer. Returns whether training is complete."""
    rank = process.rank
    out = Path(options.out)
    if options.batch % process.world_size:
        raise UserError(f"--batch {options.batch}: expected a multiple of the {process.world_size} processes")
    if options.method == "realdpo" and options.compare_every > 1 and options.anchor <= 0:
        raise UserError(f"--anchor {options.anchor}: nothing trains between two comparisons; give --compare-every 1")
    records, held_out = read_records(options)
    steps = number_of_steps(options, len(records))
    checkpoint, done = starting_point(options, process)
    about = dict(options=flags(changed(options)), processes=f"{process.world_size} × {process.device.type}")
    if folders.begin_run(options, records.hashes, steps, done, learning_rate, rank, about):
        say(f"{out} has ended: its {steps} steps are done, nothing is left to do")
        return True
    if checkpoint:
        say(f"continuing from {checkpoint}")
    previews = Previews(options, process) if options.bench else None
    policy, reference = load_models(options, process, mesh)
    optimizer = make_optimizer(policy, options)
    state = training_state(policy, reference, optimizer)
    if checkpoint:
        fill(state, folders.Stored(checkpoint))
        for moments in optimizer.state.values():
            moments["step"].fill_(done)
    dist.barrier()                                         # all ranks have everything
    if rank == 0:
        folders.withdraw_export(out)
        log = folders.open_log(out / "metrics.jsonl", done)
    with stop_signals() as stop, tqdm(initial=done, total=steps, desc=options.out, disable=rank > 0) as bar:
        asked = False
        if previews and is_due(options, done, steps):      # of the base, or those a killed run did not finish
            asked = previews.make(policy, done, stop)
        while done < steps and not asked:
            begin = time()
            metrics, asked = train_step(policy, reference, optimizer, records, options, done, process, mesh, stop)
            metrics["seconds"] = time() - begin
            due = is_due(options, done + 1, steps)
            if held_out and due:
                metrics |= evaluate(policy, reference, held_out, options, process)
            if rank == 0:
                log_step(log, done, metrics)
            done += 1
            bar.update()
            if asked or due:
                save_checkpoint(state, options, policy.base, done, rank)
            if previews and due and not asked:
                asked = previews.make(policy, done, stop)
            if rank == 0 and (asked or due):
                update_page(out)
        if not asked:
            model.save_dit(policy, out, torch.bfloat16)    # the precision in which it will run
    if asked:
        say(f"stopped after {done} steps; the same command continues")
        return False
    if rank == 0:
        folders.note_base(out, options.model, options.rank)
        files.write_json(out / "done", {"steps": steps})
    return True


# ---- The command ----------------------------------------------------------------------------------------------------

def main(options):
    """Train on a cache of records; without one, with the tiny model, go through the whole story on the toy world."""
    if options.dry_run and options.model == "tiny":
        raise UserError("--dry-run: is about CogVideoX-5B-I2V and its defaults; add --model zai-org/CogVideoX-5b-I2V")
    if options.dry_run:
        return dry_run(options, number_of_steps(options, 5000), 5000)
    toy = options.model == "tiny" and not options.data
    options.out = options.out or ("run-tiny" if options.model == "tiny" else "run")
    options.data = options.data or "cache"
    process, mesh = init_distributed()
    with files.sole_owner(Path(options.out)) if process.rank == 0 else nullcontext():
        if toy:
            from toy import laptop
            laptop.run(options, process, partial(train, process=process, mesh=mesh))
        elif train(options, process, mesh):
            say(f"done: {options.out} holds the model and metrics.jsonl; try: python sample.py --model "
                f"{quote(options.out)} --image first.png --prompt \"…\"")
    dist.destroy_process_group()

if __name__ == "__main__":
    command(main, Options, "train")
