"""A run that was interrupted equals one that never was, on one rank and on several."""
import dataclasses, json, os, re, shutil, threading
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from support import UserError, folders
from support.command import this_process
from support.files import MARK
from tests.helpers import (Count, as_a_process, carried, checkpoint, exported, metrics, processes, run_training,
                           same_tensors)

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

import model
import train

pytest_plugins = "tests.helpers"


# ---- Resuming -------------------------------------------------------------------------------------------------------

def test_two_and_two_steps_are_four_bit_for_bit(half, straight, cache, looks, tmp_path):
    assert run_training(shutil.copytree(half, tmp_path / "run"), cache, **looks) == metrics(straight)
    resume = str(half / "checkpoints" / "step-000002")
    assert len(run_training(tmp_path / "other", cache, resume=resume)) == 2
    assert {name.split(".")[0] for name in checkpoint(straight, 4)} == {"model", "ref", "exp_avg", "exp_avg_sq"}
    for run in ("run", "other"):
        assert same_tensors(checkpoint(tmp_path / run, 4), checkpoint(straight, 4))
        assert same_tensors(exported(tmp_path / run), exported(straight))

# What decides a step, and another value of it; all other options decide where and how a run runs.
DECIDES = dict(model="other", method="dpo", beta=7.0, anchor=7.0, weighting="velocity", t_draw="uniform",
               lose_per_step=2, compare_every=7, ema_decay=0.9, ema_every=7, lr=7.0, warmup=7, decay=0.1, batch=16,
               seed=7, rank=7)

def test_what_decides_a_step_may_not_change_when_a_run_goes_on_and_all_else_may(tmp_path):
    options = train.Options(model="tiny", out=str(tmp_path / "run"), steps=8)

    def begin(options, records={"a": "1"}):
        folders.begin_run(options, records, options.steps, 1, lambda *_: 1.0, rank=0)

    begin(options)
    for field in dataclasses.fields(options):
        if field.name in DECIDES:
            with pytest.raises(UserError, match=f"with {field.name} "):
                begin(dataclasses.replace(options, **{field.name: DECIDES[field.name]}))
        elif field.name not in ("out", "steps", "resume"):
            begin(dataclasses.replace(options, **{field.name: "another"}))
    for records in ({"a": "2"}, {}, {"a": "1", "b": "1"}):
        with pytest.raises(UserError, match="with records "):
            begin(options, records)

def test_the_number_of_steps_may_change_until_the_rate_has_begun_to_fall(cache, tmp_path):
    falling = partial(run_training, tmp_path / "run", cache, decay=0.5, save_every=2)
    falling(steps=2)                                       # rates 1 and 1: of two, none is lower yet
    falling(steps=4)
    assert [line["lr"] for line in metrics(tmp_path / "run")] == pytest.approx([1e-4, 1e-4, 1e-4, 5e-5])
    with pytest.raises(UserError, match=r"steps 4 \(now 8\)"):
        falling(steps=8)
    resume = str(tmp_path / "run" / "checkpoints" / "step-000004")
    lines = run_training(tmp_path / "other", cache, decay=0.5, steps=8, resume=resume, lr=1e-5)
    assert [line["lr"] for line in lines] == pytest.approx([1e-5, 7.5e-6, 5e-6, 2.5e-6])

def test_a_crash_between_log_and_checkpoint_leaves_no_line_twice(half, straight, cache, looks, tmp_path, monkeypatch):
    def crash(*arguments, **options):
        raise KeyboardInterrupt

    run = shutil.copytree(half, tmp_path / "run")
    monkeypatch.setattr(train.dcp, "save", crash)
    with pytest.raises(KeyboardInterrupt):
        run_training(run, cache, **looks)
    monkeypatch.undo()
    assert (run / "checkpoints" / f"step-000003{MARK}").is_dir()
    assert [line["step"] for line in metrics(run)] == [0, 1, 2]                    # one of them without a checkpoint
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "lo')
    assert run_training(run, cache, **looks) == metrics(straight)
    # nor half a checkpoint
    assert {p.name for p in (run / "checkpoints").iterdir()} == {"step-000003", "step-000004"}

def test_the_last_two_checkpoints_stay_and_none_goes_before_the_next_is_whole(cache, tmp_path, monkeypatch):
    remove, folder, there = shutil.rmtree, tmp_path / "run" / "checkpoints", []

    def spy(path, *arguments, **options):
        if re.fullmatch(r"step-\d{6}", Path(path).name):
            there.append(sum((p / "checkpoint.json").is_file() for p in folder.glob("step-??????")))
        remove(path, *arguments, **options)

    monkeypatch.setattr(shutil, "rmtree", spy)
    run_training(tmp_path / "run", cache, save_every=1)
    assert {p.name for p in folder.iterdir()} == {"step-000003", "step-000004"} and there == [3, 3]


# ---- Several ranks --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("ranks_a_machine, world, mesh", [
    (8, 8, (8,)), (8, 16, (2, 8)), (16, 32, (2, 16)), (1, 1, (1,)), (2, 2, (2,)), (4, 8, (8,)), (1, 16, (16,))])
def test_parameters_are_sharded_over_all_ranks_or_within_machines_of_eight(ranks_a_machine, world, mesh):
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    with as_a_process():
        assert train.make_mesh("cpu", world, ranks_a_machine).shape == mesh

def test_a_rank_with_a_stale_view_goes_on_from_where_the_others_do(half, cache, tmp_path, monkeypatch):
    """Here as a rank that does not see the second checkpoint: another says step 2."""
    run, loaded = shutil.copytree(half, tmp_path / "run"), []
    monkeypatch.setattr(folders, "choose_checkpoint", lambda *_: (run / "checkpoints" / "step-000001", 1))
    monkeypatch.setattr(train, "over_ranks", lambda number, process: 2)
    monkeypatch.setattr(train, "fill", lambda state, stored: loaded.append(stored.folder))
    run_training(run, cache, steps=3)
    assert loaded == [run / "checkpoints" / "step-000002"]

def watched(function, file):
    """`function`, adding a line of what it makes collectives carry to `file`."""
    def call(*args):
        with Count(carried) as traffic:
            result = function(*args)
        with open(file, "a") as f:
            f.write(json.dumps(+traffic.bytes) + "\n")
        return result
    return call

def two_machines(device_type, *_):
    """The mesh of two machines of two ranks, which are to behave like two of eight."""
    return init_device_mesh(device_type, (2, 2), mesh_dim_names=("replicate", "shard"))

def one_rank(rank, runs, folder, world_size, dtype, tiny):
    """Some runs, one after the other, as one of several processes, two a machine."""
    folders.TINY = tiny
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank % 2), LOCAL_WORLD_SIZE="2")
    torch.set_num_threads(1)                               # as torchrun does
    if world_size == 4:
        train.make_mesh = two_machines
    process = this_process()._replace(dtype=dtype)
    train.this_process = lambda: process
    for name in "train_step", "ema_update":
        setattr(train, name, watched(getattr(train, name), folder / f"{name}-{rank}"))
    join = dist.init_process_group
    for i, options in enumerate(runs):
        dist.init_process_group = partial(join, init_method=f"file://{folder}/store-{i}", rank=rank,
                                          world_size=world_size)
        if options.pop("stop_others", False) and rank > 0:
            asked = threading.Event()
            asked.set()
            train.stop_signals = partial(nullcontext, asked)
        try:
            run_training(**options)
        except UserError as e:
            (folder / f"error-{i}-{rank}").write_text(str(e))

def run_on_ranks(runs, folder, world_size=2, dtype=torch.float32):
    """Train on several ranks. Returns what each step of rank 0 made collectives carry, {"train_step": [...], ...}."""
    mp.start_processes(one_rank, nprocs=world_size, args=(runs, folder, world_size, dtype, folders.TINY),
                       start_method=processes.get_start_method())
    traffic = {}
    for name in ("train_step", "ema_update"):
        traffic[name] = [json.loads(line) for line in (folder / f"{name}-0").read_text().splitlines()]
    return traffic

def same_to_rounding(out, lines, straight):
    """Whether a run's log and weights are those of the undisturbed run but for the order of sums."""
    for ours, theirs in zip(lines, metrics(straight), strict=True):
        assert ours == pytest.approx({k: theirs[k] for k in ours}, abs=1e-6, rel=2e-5), out
    for name, ours in exported(out).items():
        torch.testing.assert_close(ours, exported(straight)[name], rtol=2 ** -7, atol=1e-5)      # 2⁻⁷: bf16's last bit

def test_two_ranks_take_the_steps_of_one_and_stop_when_either_is_asked_to(half, straight, cache, looks, tmp_path):
    two, stopped = tmp_path / "two", tmp_path / "stopped"
    runs = [dict(out=two, cache=cache, steps=2, **looks), dict(out=tmp_path / "odd", cache=cache, batch=3),
            dict(out=tmp_path / "close", cache=cache, steps=2, ema_decay=0.0),
            dict(out=stopped, cache=cache, stop_others=True)]
    traffic = run_on_ranks(runs, tmp_path)
    same_to_rounding(two, metrics(two), half)
    assert [line.keys() for line in metrics(two)] == [line.keys() for line in metrics(half)]
    same_to_rounding(two, run_training(two, cache, **looks), straight)         # on one rank now
    assert all("--batch 3" in (tmp_path / f"error-1-{rank}").read_text() for rank in range(2))
    weights = 4 * sum(p.numel() for p in model.load_dit("tiny").parameters())            # fp32 on a CPU
    # gathered: policy forward and backward, reference; reduced: half is a rank's own
    for step in traffic["train_step"]:
        assert step["allreduce_ default_pg"] < 100
        assert step["_allgather_base_ default_pg"] == 3 * weights
        assert step["_reduce_scatter_base_ default_pg"] == weights / 2
    assert len(traffic["ema_update"]) == len(traffic["train_step"]) == 5 and not any(traffic["ema_update"])
    assert [line["margin"] for line in metrics(tmp_path / "close")] == [0, 0]  # forwards see the reference's updates
    assert len(metrics(stopped)) == 1
    (last,) = folders.checkpoints_of(stopped)
    next(last.glob("shard-00001-*")).unlink()              # a copy that was cut off
    with pytest.raises(UserError, match=r"step-000001: .*tensor \S+ has \d+ rows, expected \d+"):
        run_training(stopped, cache)

@pytest.mark.slow
def test_two_machines_of_two_ranks_compute_what_one_rank_does(half, straight, cache, tmp_path):
    shutil.copytree(half, tmp_path / "from-one")
    runs = [dict(out=tmp_path / "four", cache=cache, save_every=2), dict(out=tmp_path / "from-one", cache=cache),
            dict(out=tmp_path / "often", cache=cache, batch=8, micro_batch=1, graphs="two", steps=1),
            dict(out=tmp_path / "adapters", cache=cache, rank=4, graphs="one", steps=2)]
    traffic = run_on_ranks(runs, tmp_path, world_size=4)
    for name in ("four", "from-one"):
        same_to_rounding(tmp_path / name, metrics(tmp_path / name), straight)
    alone = run_training(tmp_path / "adapters, alone", cache, rank=4, graphs="one", steps=2)
    for ours, theirs in zip(metrics(tmp_path / "adapters"), alone, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4, rel=1e-4)
    shutil.rmtree(tmp_path / "four" / "checkpoints" / "step-000004")
    same_to_rounding(tmp_path / "four", run_training(tmp_path / "four", cache), straight)     # the rest on one rank
    weights = 4 * sum(p.numel() for p in model.load_dit("tiny").parameters())
    *steps, often = traffic["train_step"][:7]
    for step in steps:                                     # between machines: each rank's half of the gradient
        assert step.pop("allreduce_ default_pg") < 100     # the metrics
        assert step.pop("allgather_ mesh_shard") == 8      # the gradient's norm
        assert step == {"_allgather_base_ mesh_shard": 3 * weights, "_reduce_scatter_base_ mesh_shard": weights / 2,
                        "allreduce_ mesh_replicate": weights / 2}
    assert often["_reduce_scatter_base_ mesh_shard"] == 2 * 2 * weights / 2    # of two samples' two videos each,
    assert often["allreduce_ mesh_replicate"] == weights / 2                   # but across machines once a step
    assert not any(traffic["ema_update"])

@pytest.mark.slow
def test_the_default_of_a_run_on_gpus(cache, tmp_path):
    """Two ranks that compute in bf16, compare now and then, keep two graphs, take a sample at a time and checkpoint
    selectively."""
    default = dict(cache=cache, batch=2, compare_every=2, graphs="two", checkpointing="selective", micro_batch=1,
                   lose_per_step=1)
    runs = {"straight": {}, "halves": dict(steps=2), "halves again": {}, "full": dict(checkpointing="full", steps=1),
            "whole": dict(graphs="all", steps=1)}
    every = [default | options | dict(out=tmp_path / name.removesuffix(" again")) for name, options in runs.items()]
    run_on_ranks(every, tmp_path, dtype=torch.bfloat16)
    lines = {name: metrics(tmp_path / name) for name in runs if name != "halves again"}
    for name, (first, *_) in lines.items():
        assert first["preference"] == torch.tensor(2.0).log() and first["margin"] == 0, name
    assert lines["full"] == lines["straight"][:1]
    (whole,), streamed = lines["whole"], lines["straight"][0]
    assert streamed["loss"] == pytest.approx(whole["loss"], rel=1e-3)
    assert streamed["grad_norm"] == pytest.approx(whole["grad_norm"], rel=0.02)          # bf16: up to 1.5 % was seen
    assert lines["halves"] == lines["straight"]
    assert same_tensors(exported(tmp_path / "halves"), exported(tmp_path / "straight"))
