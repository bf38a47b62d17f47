"""RealDPO, the training run: one code path for a laptop, two CPU processes, eight GPUs and several machines.

    python train.py                                                    laptop: everything, on the tiny model, in minutes
    python train.py --model MODEL --data CACHE --out RUN               one process
    torchrun --nproc_per_node 8 train.py                               CogVideoX-5B-I2V on the records in cache/

RUN afterwards holds transformer/ (opens here, --model RUN, and in diffusers), metrics.jsonl and checkpoints/.
The same command continues an interrupted run from its last checkpoint.
"""
import dataclasses, json, math, os, shutil, signal, threading, time
from collections import Counter
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from tqdm import tqdm

import data, model
from data import Records, flag, generator, option, this_process, write_json
from model import FlowPrediction, UserError
from realdpo import Condition, best_and_worst, ema_update, realdpo_loss, rwr_loss, sft_loss


@dataclasses.dataclass
class Options:
    """Align an image-to-video transformer with real videos."""
    model: str = option("", "model folder, hub id, run or tiny; default: 5B-I2V with a GPU, else tiny", "files")
    data: str = option("cache", "cache of records, from data.py and sample.py")
    out: str = option("run", "folder for the trained transformer, checkpoints and logs")
    resume: str = option("", "the checkpoint to start from; default, and always where there is one: the last in --out")
    method: Literal["realdpo", "sft", "dpo", "rwr"] = option("realdpo", "dpo and rwr: on scored negatives", "the loss")
    beta: float = option(5000.0, "strength of the preference, on the mean squared error (release: 5000)")
    anchor: float = option(1000.0, "weight of the win error added to the loss (paper: 0, see README)")
    weighting: Literal["x0", "velocity"] = option("x0", "of the error at t: 1 for x0 (App. C), 1/t² for velocity")
    t_max: float = option(0.6387, "largest noise level t; this one is the release's low-noise half (paper: 1)")
    lose_per_step: int = option(1, "negatives drawn per sample and step, for realdpo; 0: all (paper: 3)")
    ema_decay: float = option(0.996, "ω of the reference (Eq. 7, paper: 0.996, release: 0.999); 1: frozen")
    ema_every: int = option(1, "steps between two updates of the reference (paper: not given; release: 100)")
    lr: float = option(1e-5, "learning rate after warm-up (paper: 1e-5; release: 1e-6)", "the optimizer")
    warmup: int = option(20, "steps of linear warm-up")
    weight_decay: float = option(1e-4, "of AdamW")
    clip: float = option(1.0, "largest gradient norm")
    epochs: int = option(0, "passes over the records, in place of --steps; default: 10 (paper)")
    steps: int = option(0, "training steps; default: what the epochs come to")
    batch: int = option(8, "samples per step over all GPUs (paper: 8); each a win with its lose")
    micro_batch: int = option(1, "samples a GPU takes at once, if that divides its share", "the hardware")
    checkpointing: Literal["none", "full", "selective"] = option("selective", "what backward computes again")
    stream: bool = option(True, "back-propagate a sample's videos one by one: less memory, same gradient")
    compile: bool = option(False, "torch.compile each block")
    dry_run: int = option(0, "only compute what so many GPUs, 8 a machine, would need: memory, hours")
    save_every: int = option(200, "steps between checkpoints, and between looks at --eval-data", "the run")
    max_minutes: float = option(0.0, "stop with a checkpoint after this long; 0: never")
    eval_data: str = option("", "cache of held-out records with negatives")
    seed: int = option(0, "of order, noise, t and drawn negatives")


PREFERENCE = ("realdpo", "dpo")         # the methods that compare with a reference
SCORED = ("dpo", "rwr")                 # the methods that learn from scored generated videos, not from real ones
KEEP = 2                                # checkpoints


# ---- Processes and sharding: the networks know nothing of it --------------------------------------------------------

def make_mesh(device_type, world_size, ranks_a_node):
    """The mesh of all ranks. On several machines, parameters are sharded over the GPUs of a machine and replicated
    across machines, so that only gradients cross the network."""
    shape = (world_size // ranks_a_node, ranks_a_node)
    mesh = init_device_mesh(device_type, shape, mesh_dim_names=("replicate", "shard"))
    return mesh if world_size > ranks_a_node else mesh["shard"]


def init_distributed():
    """Join the process group, of one process where torchrun did not start this. Returns this Process and the mesh."""
    process = this_process()
    cuda = process.device.type == "cuda"
    backend = "cuda:nccl,cpu:gloo" if cuda else "gloo"
    alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
    # Ranks wait while rank 0 writes an export (11 GB at 5B) and the slowest its part of a checkpoint (89 GB in all).
    dist.init_process_group(backend, timeout=timedelta(hours=3), device_id=process.device if cuda else None, **alone)
    ranks_a_node = int(os.environ.get("LOCAL_WORLD_SIZE", process.world_size))
    return process, make_mesh(process.device.type, process.world_size, ranks_a_node)


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


def load_models(options, process, mesh):
    """Policy and reference, sharded, fp32; they compute in the process's dtype. Raises UserError unless every shard of
    one is that of the other, bit for bit."""
    split = partial(shard, mesh=mesh, dtype=process.dtype, compile=options.compile)
    policy = model.load_dit(options.model, process.device, torch.float32, split)
    reference = model.load_dit(options.model, process.device, torch.float32, split)
    different = torch.zeros((), device=process.device)
    for p, r in zip(policy.parameters(), reference.parameters(), strict=True):
        different += not torch.equal(p.to_local(), r.to_local())
    dist.all_reduce(different)
    if different > 0:
        raise UserError(f"{different:.0f} shards of the reference are not the policy's; both must start from one model")
    policy.checkpointing = options.checkpointing
    return policy.train(), reference.requires_grad_(False)


def make_optimizer(policy, options):
    """AdamW whose moments exist from the start, so that a checkpoint can be read into them."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=options.lr, betas=(0.9, 0.95),
                                  weight_decay=options.weight_decay, fused=True)
    for p in policy.parameters():
        optimizer.state[p] = dict(step=torch.zeros((), device=p.device),
                                  exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
    return optimizer


# ---- One step, from the records to the updated reference ------------------------------------------------------------

def batch_indices(options, count, step):
    """Indices of the records of one global batch, a function of (seed, step) alone: a fresh order each epoch."""
    indices = []
    for position in range(step * options.batch, (step + 1) * options.batch):
        epoch, place = divmod(position, count)
        order = torch.randperm(count, generator=generator("order", options.seed, epoch))
        indices.append(order[place].item())
    return indices


def draw_sample(record, options, step, place, t_min):
    """A record with this step's t, noise and negatives, a function of (seed, step, place in the batch). t is uniform in
    (t_min, t_max]; t_min is the least noise that the network was trained on."""
    rng = generator("train", options.seed, step, place)
    record["t"] = t_min + (options.t_max - t_min) * (1 - torch.rand((), generator=rng))
    record["noise"] = torch.randn(record["win"].shape, generator=rng)
    if "noised" in record:
        noised = record.pop("noised")
        record["image"] = noised[torch.randint(len(noised), (), generator=rng)]
    if options.lose_per_step and options.method == "realdpo":
        drawn = torch.randperm(len(record["lose"]), generator=rng)[:options.lose_per_step]
        record["lose"] = record["lose"][drawn]
    return record


def loss_of(policy, reference, batch, options):
    """Loss and metrics of a micro-batch (a dict of stacked records) by the chosen method."""
    common = dict(cond=Condition(batch["text"], batch["image"]), t=batch["t"], noise=batch["noise"],
                  weighting=options.weighting)
    if options.method == "sft":
        return sft_loss(policy, win=batch["win"], **common)
    if options.method == "rwr":
        return rwr_loss(policy, videos=batch["lose"], scores=batch["scores"], **common)
    win, lose, anchor = batch["win"], batch["lose"], options.anchor
    if options.method == "dpo":                            # the baseline is as published, without an anchor
        win, lose = best_and_worst(lose, batch["scores"])
        anchor = 0.0
    return realdpo_loss(policy, reference, win=win, lose=lose, beta=options.beta, anchor=anchor,
                        stream=options.stream, **common)


def accumulate_gradients(policy, reference, records, samples, options, step, device):
    """Forward and backward of this rank's (place in the batch, record index) pairs, a micro-batch at a time. Returns
    the mean of their metrics. The parts are equal, so the mean of their gradients is the batch's."""
    parts = len(samples) // math.gcd(len(samples), options.micro_batch)
    total = Counter()
    for part in range(parts):
        rows = [draw_sample(records[index], options, step, place, policy.t_min)
                for place, index in samples[part::parts]]
        batch = {name: torch.stack([row[name] for row in rows]).to(device).float() for name in rows[0]}
        loss, metrics = loss_of(policy, reference, batch, options)
        if loss.requires_grad:                             # else it was streamed, and is back-propagated already
            loss.backward()
        for name, value in {"loss": loss.detach(), **metrics}.items():
            total[name] += value.double() / parts
    torch._foreach_div_([p.grad.to_local() for p in policy.parameters()], parts)
    return dict(total)


def train_step(policy, reference, optimizer, records, options, step, process):
    """One optimizer step. Returns the metrics, averaged over all ranks, and whether some rank was asked to stop."""
    samples = list(enumerate(batch_indices(options, len(records), step)))
    mine = samples[process.rank::process.world_size]
    metrics = accumulate_gradients(policy, reference, records, mine, options, step, process.device)
    metrics["asked"] = torch.tensor(float(stop.is_set()), dtype=torch.float64, device=process.device)
    numbers = torch.stack(list(metrics.values())) / process.world_size
    dist.all_reduce(numbers)
    metrics = dict(zip(metrics, numbers.tolist()))
    asked = metrics.pop("asked") > 0
    metrics["grad_norm"] = torch.nn.utils.clip_grad_norm_(policy.parameters(), options.clip).full_tensor().item()
    check_health(metrics, options, step, [records.names[index] for _, index in samples])
    metrics["lr"] = options.lr * min(1, (step + 1) / max(1, options.warmup))
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


# ---- Checkpoints: tensors only, in safetensors; a folder has its name only once it is whole -------------------------

def checkpoints(options):
    """The whole checkpoints under --out, oldest first."""
    return sorted((Path(options.out) / "checkpoints").glob("step-??????"))


def training_state(policy, reference, optimizer):
    """Everything that training changes, as one flat dict of (sharded) tensors."""
    state = {}
    for name, p in policy.net.named_parameters():
        state[f"model.{name}"] = p.detach()
        state[f"exp_avg.{name}"] = optimizer.state[p]["exp_avg"]
        state[f"exp_avg_sq.{name}"] = optimizer.state[p]["exp_avg_sq"]
    for name, p in reference.net.named_parameters():
        state[f"ref.{name}"] = p.detach()
    return state


def save_checkpoint(state, options, step, rank):
    """Write checkpoints/step-N, then forget all but the last KEEP."""
    folder = Path(options.out) / "checkpoints"
    part, final = folder / f"step-{step:06d}.part", folder / f"step-{step:06d}"
    if rank == 0:
        for left in folder.glob("step-*.*"):               # by runs that were killed in here
            shutil.rmtree(left, ignore_errors=True)
        write_json(part / "options.json", {"step": step, **dataclasses.asdict(options)})
    dist.barrier()
    files = {name: 1 + i // 200 for i, name in enumerate(state)}         # a file is in CPU memory thrice as it is made
    # One process needs no collectives, and gloo's threads would make every later step on a CPU half as slow again.
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
            shutil.rmtree(old, ignore_errors=True)         # in use by another: the next save tries again
    dist.barrier()


# Options that may change when a run goes on: they decide where, how and how long it runs, not what a step does.
MAY_CHANGE = {"out", "steps", "epochs", "save_every", "resume", "max_minutes", "checkpointing", "stream", "micro_batch",
              "compile", "eval_data", "dry_run"}


def load_checkpoint(state, optimizer, folder, options):
    """Read a checkpoint into the models and the optimizer. Returns its step. Raises UserError where it is missing or
    not whole, or is of this --out and was made with options that make it another run."""
    saved = model.read_json(folder / "options.json")
    different = [f"{flag(name)} {saved.get(name)} (now {value})" for name, value in dataclasses.asdict(options).items()
                 if name not in MAY_CHANGE and saved.get(name) != value]
    if different and folder.parent == Path(options.out) / "checkpoints":
        raise UserError(f"{folder}: was made with {', '.join(different)}; use the same options or another --out")
    numbers = Counter()                                    # each rank's file has its part of each tensor
    for file in folder.glob("*.safetensors"):
        for name, shape in data.read_header(file)[0].items():
            numbers[name] += math.prod(shape)
    wrong = [name for name in {*numbers, *state} if name not in state or numbers[name] != state[name].numel()]
    if wrong:
        raise UserError(f"{folder}: not a whole checkpoint of this model (tensor {min(wrong)}); "
                        "delete it to continue from an earlier one")
    try:
        dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=dist.get_world_size() == 1)
    except dcp.api.CheckpointException as e:
        raise UserError(f"{folder}: not a whole checkpoint ({model.dcp_reason(e)!r}); "
                        "delete it to continue from an earlier one") from None
    for moments in optimizer.state.values():
        moments["step"].fill_(saved["step"])
    return saved["step"]


# ---- Looking at it: held-out records, FLOP, the log -----------------------------------------------------------------

EVAL_T = (0.1, 0.3, 0.5, 0.7, 0.9)
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}    # dense bf16 FLOP/s, by what the device's name contains


@torch.no_grad()
def evaluate(policy, reference, records, options, process):
    """Preference loss, margin, accuracy and the four errors on held-out records at fixed t and fixed noise: their means
    over t, {"eval_margin": …}, and at each t, {"eval_margin_t0.1": …}."""
    options, sums = dataclasses.replace(options, method="realdpo", stream=False), Counter()
    for i in range(math.ceil(len(records) / process.world_size)):      # as many on every rank: they are collectives
        number = process.rank + i * process.world_size
        index = number % len(records)
        share = (number < len(records)) / len(records)     # a record that only pads the last round has weight 0
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


def step_flops(config, shape, options, n_lose):
    """(FLOP, tokens) of one step over all ranks; latents of shape (C,F,H,W), n_lose negatives a record."""
    products, attention, tokens = model.forward_flops(config, shape[1:])
    forward = products + attention
    again = {"none": 0, "full": forward, "selective": products}[options.checkpointing]
    passes = 3 * forward + again                           # the policy's: backward takes twice as much as forward
    if options.method in PREFERENCE:
        passes += forward                                  # the reference's
    drawn = min(n_lose, options.lose_per_step or n_lose)
    sequences = options.batch * {"realdpo": 1 + drawn, "sft": 1, "dpo": 2, "rwr": n_lose}[options.method]
    return passes * sequences, tokens * sequences


def console_line(step, metrics):
    """What to watch, in one line; everything else is in metrics.jsonl."""
    line = f"step {step:5d}  loss {metrics['loss']:.4g}"
    if "ref_win" in metrics:                               # the differences: t and noise are the same on both sides
        line += (f"  win {metrics['win'] - metrics['ref_win']:+.2e}  lose {metrics['lose'] - metrics['ref_lose']:+.2e}"
                 f"  margin {metrics['margin']:.3g}  acc {metrics['accuracy']:.2f}")
    line += f"  lr {metrics['lr']:.1e}  {metrics['seconds']:.2f} s"
    if "mfu" in metrics:
        line += f"  mfu {metrics['mfu']:.0%}"
    if "eval_margin" in metrics:
        line += (f"\n  held out  preference {metrics['eval_preference']:.4f}  margin {metrics['eval_margin']:.3g}"
                 f"  acc {metrics['eval_accuracy']:.2f}")
    return line


def open_log(file, first):
    """metrics.jsonl, open to append, without the lines of steps that will be done again."""
    lines = file.read_text().splitlines() if file.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]      # a killed run's last may be cut short
    write_json(file, *[row for row in rows if row["step"] < first])
    return open(file, "a")


def log_step(file, step, metrics):
    """A line on the console and one in metrics.jsonl."""
    tqdm.write(console_line(step, metrics))
    if step == 0 and abs(metrics.get("preference", math.log(2)) - math.log(2)) > 1e-3:
        # Policy and reference agree, but their kernels may round differently, which β magnifies.
        tqdm.write(f"warning: the first preference loss is {metrics['preference']:.6f}, not log 2, though policy and "
                   "reference have the same weights: their forward passes round differently")
    try:
        file.write(json.dumps({"step": step, **metrics}) + "\n")
        file.flush()
    except OSError as e:
        raise UserError(f"{file.name}: cannot be written ({e}); make room, then start again") from e


# ---- The run --------------------------------------------------------------------------------------------------------

def number_of_steps(options, count):
    """What --epochs over `count` records come to; else --steps; else what the paper's ten epochs come to."""
    if options.steps and not options.epochs:
        return options.steps
    return math.ceil((options.epochs or 10) * count / options.batch)


def check_options(options, world_size):
    """Raise UserError for options that contradict each other or the number of processes."""
    least = dict(batch=1, micro_batch=1, ema_every=1, save_every=1, epochs=0, steps=0, lose_per_step=0)
    for name, smallest in least.items():
        if getattr(options, name) < smallest:
            raise UserError(f"{flag(name)} {getattr(options, name)}: expected at least {smallest}")
    if options.batch % world_size:
        raise UserError(f"--batch {options.batch}: expected a multiple of the {world_size} processes")
    if not 0.1 <= options.t_max <= 1:
        raise UserError(f"--t-max {options.t_max}: expected 0.1 to 1")


def check_records(records, config):
    """Raise UserError for records that are not of the model with this config."""
    shapes = {name: tuple(tensor.shape) for name, tensor in records[0].items()}
    found = shapes["win"][0], *shapes["text"]
    expected = config["out_channels"], config["max_text_seq_length"], config["text_embed_dim"]
    if found != expected:
        raise UserError(f"{records.folder}: (channels, tokens, text width) are {found}, this model's {expected}; "
                        "encode the videos with the model to be trained")


stop = threading.Event()                                   # set when this process is to finish its step, save and exit


def finish_step(number, _):
    """On SIGTERM (pre-emption; launchers repeat it) and Ctrl-C the run ends after its step; Ctrl-C twice: at once."""
    stop.set()
    if number == signal.SIGINT:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def train(options, process, mesh):
    """Steps until done or asked to stop, checkpoints on the way, the trained transformer at the end. Returns whether
    training is complete."""
    begin, main_rank = time.time(), process.rank == 0
    check_options(options, process.world_size)
    config = model.read_dit_config(options.model)
    records = Records(options.data, negatives=options.method != "sft", scores=options.method in SCORED)
    held_out = Records(options.eval_data) if options.eval_data else None
    check_records(records, config)
    if held_out:
        check_records(held_out, config)
    n_lose = len(records[0].get("lose", ()))
    if options.method == "realdpo" and options.lose_per_step > n_lose:
        raise UserError(f"--lose-per-step {options.lose_per_step}: the records of {options.data} have {n_lose}")
    policy, reference = load_models(options, process, mesh)
    optimizer = make_optimizer(policy, options)
    state = training_state(policy, reference, optimizer)
    first, steps = 0, number_of_steps(options, len(records))
    checkpoint = max(checkpoints(options), default=options.resume)
    if checkpoint:
        first = load_checkpoint(state, optimizer, Path(checkpoint), options)
        data.say(f"continuing from {checkpoint}")
    flops, tokens = step_flops(config, records[0]["win"].shape, options, n_lose)
    gpu = torch.cuda.get_device_name() if process.device.type == "cuda" else ""
    peak = next((rate for name, rate in PEAK.items() if name in gpu), None)
    log = open_log(Path(options.out) / "metrics.jsonl", first) if main_rank else None
    bar = tqdm(range(first, steps), initial=first, total=steps, desc=options.out, disable=not main_rank)
    stop.clear()
    signal.signal(signal.SIGTERM, finish_step)
    signal.signal(signal.SIGINT, finish_step)
    for step in bar:
        tick = time.time()
        if options.max_minutes and tick - begin > 60 * options.max_minutes:
            stop.set()
        metrics, asked = train_step(policy, reference, optimizer, records, options, step, process)
        metrics["seconds"] = time.time() - tick
        metrics["tokens_per_second"] = tokens / metrics["seconds"]
        if peak:
            metrics["mfu"] = flops / metrics["seconds"] / process.world_size / peak
        due = step + 1 == steps or (step + 1) % options.save_every == 0
        if held_out and due:
            metrics |= evaluate(policy, reference, held_out, options, process)
        if main_rank:
            log_step(log, step, metrics)
        if asked or due:
            save_checkpoint(state, options, step + 1, process.rank)
        if asked and step + 1 < steps:
            bar.close()                                    # so that what follows is the last line
            data.say(f"stopped after {step + 1} steps; checkpoint saved in {options.out}/checkpoints, "
                     "and the same command continues")
            return False
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    model.save_dit(policy, options.out, torch.bfloat16)    # in the precision it will run in
    if main_rank:
        base = Path(model.base_of(options.model))
        write_json(Path(options.out) / "base.json", {"model": str(base.resolve() if base.is_dir() else base)})
    return True


# ---- The dry run: the real code on tensors without data -------------------------------------------------------------

def measure_memory(options, config, shape, n_lose, mesh):
    """The peak bytes of a step on one rank, {kind: bytes}, and the number of parameters: the real code on tensors
    without data, watched by torch's FSDP tracker. Latents of shape (C,F,H,W), n_lose negatives in a step."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
    split = partial(shard, mesh=mesh, dtype=torch.bfloat16)
    model.rope_table.cache_clear()                         # here and below: no fake tensors among the real ones
    with FakeTensorMode():
        policy = model.Denoiser(model.empty(model.DiT, config, torch.float32, "cpu", split), FlowPrediction(), None)
        reference = model.Denoiser(model.empty(model.DiT, config, torch.float32, "cpu", split), FlowPrediction(), None)
        policy.checkpointing = options.checkpointing
        tracker = FSDPMemTracker(policy.net, make_optimizer(policy, options))
        reference.requires_grad_(False)
        n = math.gcd(options.micro_batch, options.batch // mesh.size())
        batch = dict(win=torch.randn(n, *shape), lose=torch.randn(n, n_lose, *shape), t=torch.rand(n),
                     noise=torch.randn(n, *shape), scores=torch.rand(n, n_lose),
                     image=torch.randn(n, shape[0], 1, *shape[2:]),
                     text=torch.randn(n, config["max_text_seq_length"], config["text_embed_dim"]))
        with tracker:
            for _ in range(2):                             # the second meets the first's gradients, as later ones do
                loss, _ = loss_of(policy, reference, batch, options)
                if loss.requires_grad:
                    loss.backward()
    model.rope_table.cache_clear()
    held = sum(p.to_local().nbytes for p in policy.parameters())           # a rank's part of a network
    memory = {"parameters": held, "gradients": held, "Adam": 2 * held, "reference": held}
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    if options.method not in PREFERENCE:                   # the reference is loaded, but took no part
        peak += held
    memory["activations, gathered blocks"] = peak - sum(memory.values())
    memory["context, NCCL …"] = 5 * 2 ** 30                # a guess, 4 to 6
    return memory, sum(p.numel() for p in policy.parameters())


def dry_run(options, clips=5000, n_lose=3, utilisation=0.4):
    """Print what a run on --dry-run GPUs needs, and how long the paper's 5,000 clips take at `utilisation`."""
    from torch.testing._internal.distributed.fake_pg import FakeStore
    gpus = options.dry_run
    if gpus < 1 or gpus > 8 and gpus % 8:
        raise UserError(f"--dry-run {gpus}: expected up to 8 GPUs, or a multiple of 8")
    check_options(options, gpus)
    print("two steps on tensors without data; at 5B this takes some minutes")
    config = model.PUBLISHED_DIT if options.model == data.HUB_MODEL else model.read_dit_config(options.model)
    frames = (config["sample_frames"] - 1) // config["temporal_compression_ratio"] + 1
    shape = (config["out_channels"], frames, config["sample_height"], config["sample_width"])
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=gpus)
    drawn = n_lose if options.method in SCORED else min(n_lose, options.lose_per_step or n_lose)
    memory, parameters = measure_memory(options, config, shape, drawn, make_mesh("cpu", gpus, min(gpus, 8)))
    dist.destroy_process_group()
    memory["at the peak; an 80 GB GPU gives 78"] = sum(memory.values())
    flops, tokens = step_flops(config, shape, options, n_lose)
    steps, per_hour = number_of_steps(options, clips), gpus * utilisation * PEAK["H100"] * 3600
    sampling = clips * n_lose * 25 * 2 * sum(model.forward_flops(config, shape[1:])[:2])
    print(f"{parameters:,} parameters, {gpus} ranks, {options.batch} samples and {tokens:,} tokens a step, "
          f"{flops / options.batch / 1e15:.3g} PFLOP a sample")
    for kind, size in memory.items():
        print(f"{size / 2 ** 30:7.2f} GiB a rank  {kind}")
    print(f"at {utilisation:.0%} of an H100's {PEAK['H100'] / 1e12:.0f} TFLOP/s, {clips} clips: {steps} steps of "
          f"{3600 * flops / per_hour:.3g} s, {steps * flops / per_hour:.3g} h;\n"
          f"before that, {n_lose} negatives a clip, 25 evaluations with guidance: {sampling / per_hour:.3g} h")


# ---- The command ----------------------------------------------------------------------------------------------------

def main(options):
    """Train on a cache of records; without one, on the tiny model, the whole story on the toy world."""
    if options.dry_run:
        return dry_run(options)
    process, mesh = init_distributed()
    if Path(options.data).is_dir():
        if train(options, process, mesh) and process.rank == 0:
            print(f"done: {options.out} holds the model and metrics.jsonl; try: python sample.py --model {options.out} "
                  "--image first.png --prompt \"…\"")
    elif options.model == "tiny" and options.data == Options.data:
        from toy import laptop
        laptop.run(options, process, partial(train, process=process, mesh=mesh))
    else:
        raise UserError(f"--data {options.data}: no such cache; "
                        f"make it with: python data.py --videos DIR --model {options.model} --out {options.data}"
                        f" and: python sample.py --model {options.model} --data {options.data}; "
                        "or watch it on the toy world: python train.py --model tiny")
    dist.destroy_process_group()


if __name__ == "__main__":
    data.command(main, Options, "train")
