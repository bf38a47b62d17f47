"""Training as people run it: watched, taken from any checkpoint, alone in its folder, stopped by signals."""
import os, re, shutil, signal, subprocess, sys, threading, time
from functools import partial
from pathlib import Path

import pytest
import torch

import model
import sample
import train
from support import UserError, command, films, folders
from support.files import MARK, read_json, sole_owner, write_json
from support.folders import base_of, choose_checkpoint, defaults_of, fingerprint_of, last_checkpoint
from tests.helpers import (REPO, SHORT, checkpoint, contents, generate_bench, metrics, on_rank, refusal,
                           run_training, same_tensors, spy_on_losses, spy_on_videos)
from toy import laptop

pytest_plugins = "tests.helpers"


# ---- Videos of a bench at every checkpoint --------------------------------------------------------------------------

QUICK = dict(steps=3, guidance=1.0)                        # as if the model had these defaults

@pytest.fixture(scope="module")
def watched(cache, shots):
    """A run of four steps with videos of a bench at its start, in its middle and at its end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folders, "defaults_of", lambda path, command: QUICK)
        run_training(cache.parent / "watched", cache, bench=str(shots), save_every=2)
    return cache.parent / "watched"

def test_a_bench_shows_the_start_every_checkpoint_and_the_end(watched, straight, shots, tmp_path):
    steps = {"step-000000": "tiny", "step-000002": watched / "checkpoints" / "step-000002", "step-000004": watched}
    assert {path.name for path in (watched / "videos").iterdir()} == {*steps, "bench.json"}
    for step, trained in steps.items():
        settings = QUICK | dict(frames=0, solver="multistep")                            # as train.py chooses them
        generate_bench(shots, tmp_path / step, model=str(trained), **settings)
        ours, theirs = contents(watched / "videos" / step), contents(tmp_path / step)
        assert {*ours} == {*theirs} - {"bench.json"} == {"somersault.mp4", "walk-12.mp4"}
        if step != "step-000004":                          # which was exported in bf16, while the run shows it in fp32
            assert all(ours[name] == theirs[name] for name in ours)
    shown = {contents(watched / "videos" / step)["somersault.mp4"] for step in steps}
    assert len(shown) == 3                                 # and training changes what one sees
    assert metrics(watched) == [{k: v for k, v in line.items() if "eval" not in k} for line in metrics(straight)]

def test_a_stop_is_heeded_within_one_video_and_the_same_command_makes_the_others(watched, cache, shots, tmp_path,
                                                                                 monkeypatch):
    monkeypatch.setattr(folders, "defaults_of", lambda path, command: QUICK)
    run = shutil.copytree(watched, tmp_path / "run")       # as if it had been killed before its step 2 was shown
    for name in ("checkpoints/step-000004", "videos/step-000002", "videos/step-000004", "transformer", "scheduler"):
        shutil.rmtree(run / name)
    (run / "done").unlink()
    made, write = spy_on_videos(monkeypatch), films.write_video

    def write_and_stop(*video):
        write(*video)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(films, "write_video", write_and_stop)
    assert len(run_training(run, cache, bench=str(shots), save_every=2)) == 2            # and no step more
    assert made == ["somersault.mp4"]
    monkeypatch.setattr(films, "write_video", write)
    run_training(run, cache, bench=str(shots), save_every=2)
    assert made == ["somersault.mp4", "walk-12.mp4", "somersault.mp4", "walk-12.mp4"]
    assert contents(run / "videos") == contents(watched / "videos") and metrics(run) == metrics(watched)
    other = shutil.copytree(shots, tmp_path / "other")     # and other pictures are not mixed with those it has shown
    (other / "walk-12.txt").write_text("another caption")
    with pytest.raises(UserError, match="run/videos: was made with captions .*another caption"):
        run_training(run, cache, bench=str(other), save_every=2, steps=5)
    assert (run / "transformer").is_dir()                  # it has not gone on, so it keeps what it has exported

def test_all_ranks_make_as_many_videos_since_a_forward_is_a_collective(shots, tmp_path, monkeypatch):
    asked, made = [], spy_on_videos(monkeypatch)
    monkeypatch.setattr(sample, "sample", lambda denoiser, noise, cond, **options: asked.append(noise) or noise)
    monkeypatch.setattr(train, "over_ranks", lambda number, process: number)
    for rank in range(4):                                  # of two pictures
        process = command.Process(rank, 4, torch.device("cpu"), torch.float32)
        previews = train.Previews(train.Options(model="tiny", bench=str(shots), out=str(tmp_path / str(rank))), process)
        assert not previews.make(None, 7, threading.Event()) and len(asked) == rank + 1
    assert made == ["somersault.mp4", "walk-12.mp4"] * 2


# ---- A checkpoint is a model ----------------------------------------------------------------------------------------

def test_a_checkpoint_and_its_reference_are_models(half, cache, tmp_path):
    folder, stored = half / "checkpoints" / "step-000002", checkpoint(half, 2)
    for path, kind in ((folder, "model."), (folder / "ref", "ref.")):
        net = model.load_dit(path).net.state_dict()
        assert same_tensors(net, {name[len(kind):]: stored[name] for name in stored if name.startswith(kind)})
    assert defaults_of(folder, "sample") == defaults_of("tiny", "sample") != {}
    (first,) = run_training(tmp_path / "on", cache, model=str(folder), steps=1)
    assert first["margin"] == 0                            # a run of its own, with a reference of its own
    assert base_of(tmp_path / "on") == "tiny"
    assert len({fingerprint_of(path, "transformer") for path in (folder, folder / "ref", "tiny")}) == 3

def test_a_run_opens_before_it_has_ended(half, tmp_path):
    assert last_checkpoint(half) is None                   # it has ended
    run = shutil.copytree(half, tmp_path / "run", ignore=shutil.ignore_patterns("transformer", "done"))
    (run / "base.json").unlink()
    stored = model.load_dit(run / "checkpoints" / "step-000002").net.state_dict()
    assert same_tensors(model.load_dit(run).net.state_dict(), stored)


# ---- What a folder holds, and where a run goes on -------------------------------------------------------------------

@pytest.mark.parametrize("name", ["transformer", "scheduler", "metrics.jsonl", "checkpoints", "videos/step-000000",
                                  "base.json", "done", "index.html", folders.ADAPTERS])
def test_what_a_run_would_write_over_is_refused_by_name(name, cache, tmp_path):
    for mine in ("videos/mine", "transformer.old", name):                    # of which only the last is in the way
        (tmp_path / mine).mkdir(parents=True)
    with pytest.raises(UserError, match=f"^{tmp_path}/{name}: is there"):
        run_training(tmp_path, cache)

def test_a_run_that_has_ended_is_left_alone_and_goes_on_if_asked_to(half, own_cache, tmp_path, monkeypatch, capsys):
    run = shutil.copytree(half, tmp_path / "run")
    backups = [run / "checkpoints" / "step-000001.best", run / "transformer.old"]
    for backup in backups:
        shutil.copytree(run / "transformer", backup)
    before = contents(run)
    for options in (dict(steps=2), dict(steps=2, save_every=1, graphs="two")):
        run_training(run, own_cache, **options)
        assert "its 2 steps are done, nothing is left to do" in capsys.readouterr().out
        changed = {name for name, _ in contents(run).items() ^ before.items()}
        assert changed <= {"run.json"}                     # which notes the options of the last command
    exported, there = [run / name for name in ("transformer", "scheduler", "done")], []
    spy_on_losses(monkeypatch, lambda count, loss: there.extend(filter(Path.exists, exported)) or loss)
    run_training(run, own_cache, steps=3)                  # the same records may lie elsewhere
    assert not there and read_json(run / "done") == {"steps": 3} and all(map(Path.exists, exported))
    assert all(contents(backup) == contents(half / "transformer") for backup in backups)

def test_an_ended_run_whose_checkpoints_are_gone_is_kept_and_named(half, cache, tmp_path):
    run = shutil.copytree(half, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    before = contents(run / "transformer")
    with pytest.raises(UserError, match="run: has ended after 2 steps, without a checkpoint"):
        run_training(run, cache)
    assert contents(run / "transformer") == before and len(metrics(run)) == 2 and (run / "done").is_file()

@pytest.fixture
def steps(tmp_path):
    """Checkpoints of steps 1 and 2 of a run, and of step 5 of another."""
    places = {n: tmp_path / out / "checkpoints" / f"step-{n:06d}" for n, out in ((1, "run"), (2, "run"), (5, "first"))}
    for number, folder in places.items():
        write_json(folder / "checkpoint.json", {"step": number})
    return places

def test_a_run_goes_on_from_its_own_last_checkpoint_else_from_where_it_began(steps, tmp_path):
    for name in ("step-000003.best", f"step-000004{MARK}"):
        shutil.copytree(steps[2], steps[2].with_name(name))
    for resume in ("", str(steps[5])):
        assert choose_checkpoint(tmp_path / "run", resume) == (steps[2], 2)
    assert choose_checkpoint(tmp_path / "new", str(steps[5])) == (steps[5], 5)
    assert choose_checkpoint(tmp_path / "new", "") == (None, 0)

@pytest.mark.parametrize("name", ["run", "run/checkpoints", "run/checkpoints/latest", "run/checkpoints/step-000009"])
def test_what_is_no_checkpoint_is_answered_with_those_there_are(name, steps, tmp_path):
    with pytest.raises(UserError, match=f"no checkpoint; expected a folder such as {steps[1]}, {steps[2]}$"):
        choose_checkpoint(tmp_path / "other", str(tmp_path / name))

def test_a_run_is_not_taken_back_to_an_older_checkpoint_of_its_own(half, cache, tmp_path):
    run = shutil.copytree(half, tmp_path / "run")
    with pytest.raises(UserError, match=r"run: was made with resume  \(now \S+step-000002\)"):
        run_training(run, cache, steps=3, resume=str(run / "checkpoints" / "step-000002"))

def test_a_second_job_says_who_is_at_work(cache, tmp_path, monkeypatch):
    with sole_owner(tmp_path / "run"):
        message = refusal(monkeypatch, *f"train --model tiny --data {cache} --out {tmp_path / 'run'}".split())
    assert re.search(rf"run: process {os.getpid()} on \S+, since 2\d\d\d-[-: \d]+, is at work there", message)

@pytest.mark.parametrize("options, place", [
    (dict(model="tiny"), ("run-tiny", "toy")), (dict(model="another"), ("run", "cache")),
    (dict(model="tiny", data="mine"), ("run-tiny", "mine")), (dict(model="tiny", out="a"), ("a", "toy"))], ids=str)
def test_the_toy_has_a_folder_of_its_own(options, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    went = []
    monkeypatch.setattr(train, "train", lambda options, *_: went.append((options.out, options.data)))
    monkeypatch.setattr(laptop, "run", lambda options, *_, **__: went.append((options.out, "toy")))
    train.main(train.Options(**options))
    assert went == [place]


# ---- Signals, and how a command ends --------------------------------------------------------------------------------

@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP])
def test_a_run_that_is_told_to_stop_finishes_its_step_and_saves_but_not_with_nohup(number, straight, cache, tmp_path,
                                                                                   monkeypatch, capsys):
    def twice_in_the_second(count, loss):                  # Slurm signals every process, and torchrun passes its own on
        for _ in range(2 if count == 2 else 0):
            os.kill(os.getpid(), number)
        return loss

    spy_on_losses(monkeypatch, twice_in_the_second)
    before = signal.signal(number, print)                  # one that does no harm, and not nohup's
    assert len(run_training(tmp_path / "run", cache)) == 2                     # it returns: exit status 0
    assert "the same command continues" in capsys.readouterr().out and not (tmp_path / "run" / "transformer").exists()
    assert same_tensors(checkpoint(tmp_path / "run", 2), checkpoint(straight, 2))
    assert signal.signal(number, signal.SIG_IGN) == print
    with command.stop_signals() as stop:
        os.kill(os.getpid(), number)
        assert not stop.is_set()
    signal.signal(number, before)

@pytest.mark.parametrize("error, line", [
    (UserError("a mistake"), "error: a mistake"), (KeyboardInterrupt(), "interrupted; what is finished stays"),
    (RuntimeError("of the sizes"), "of the sizes"),        # a mistake of ours ends in a traceback
    (RuntimeError("Connection closed by peer"), "another rank has gone"),                                  # gloo
    (RuntimeError("ncclRemoteError: a remote process exited"), "another rank has gone"),                   # NCCL
    (torch.OutOfMemoryError("CUDA out of memory. Tried to"), "error: the GPU's memory ran out (CUDA out of memory); ")])
def test_a_command_ends_in_a_line_and_a_status(error, line, monkeypatch):
    def work(options):
        raise error

    on_rank(monkeypatch, 0, 2)
    monkeypatch.setattr(sys, "argv", ["train.py", "--model", "tiny"])
    with pytest.raises((SystemExit, RuntimeError)) as ended:
        command.command(work, train.Options, "train")
    assert str(ended.value).startswith(line)

def test_a_command_knows_the_home_folder_and_its_models_defaults(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setattr(sys, "argv", "train.py --model tiny --out=~/run --beta 7".split())
    taken = []
    command.command(taken.append, train.Options, "train")
    (options,) = taken
    assert (options.out, options.beta, options.lr) == ("/home/me/run", 7.0, defaults_of("tiny", "train")["lr"])

SRUN = """#!/bin/bash
shift 2                                                    # its own options
for rank in 0 1; do SLURM_PROCID=$rank SLURM_LOCALID=$rank "$@" & pids="$pids $!"; done
trap 'kill -USR1 $pids' USR1
for pid in $pids; do
    while true; do wait $pid; code=$?; kill -0 $pid 2>/dev/null || break; done           # the trap ends a wait, too
    [ $code = 0 ] || exit $code
done
"""

@pytest.mark.slow
def test_the_slurm_script_saves_at_the_signal_and_asks_to_be_queued_again(cache, tmp_path):
    """With stubs of srun, which starts two ranks here, and of scontrol, which notes what it is asked."""
    out, asked = tmp_path / "run", tmp_path / "asked"
    scontrol = f'#!/bin/bash\n[ "$1" = show ] && echo 127.0.0.1 || echo "$@" >> {asked}\n'
    for name, text in (("srun", SRUN), ("scontrol", scontrol)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment = os.environ | dict(PATH=f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}",
                                    SLURM_NTASKS="2", SLURM_JOB_ID="7", SLURM_JOB_NUM_NODES="1",
                                    SLURM_JOB_NODELIST="here", SLURM_CPUS_PER_TASK="1")
    start = partial(subprocess.Popen, cwd=REPO, env=environment)
    options = command.flags(SHORT | dict(data=cache, out=out, save_every=9000)).split()
    job = start(["bash", "assets/train.slurm", *options, "--steps", "5000"])
    while job.poll() is None and not ((out / "metrics.jsonl").is_file() and metrics(out)):
        time.sleep(0.1)
    subprocess.run(["pkill", "-USR1", "-P", str(job.pid)], check=True)       # as SLURM signals a job's steps
    assert job.wait(timeout=120) == 0 and asked.read_text() == "requeue 7\n"
    done = len(metrics(out))
    assert done < 5000 and (out / "checkpoints" / f"step-{done:06d}").is_dir()
    assert start(["bash", "assets/train.slurm", *options, "--steps", str(done + 1)]).wait() == 0
    assert (out / "done").is_file() and asked.read_text() == "requeue 7\n"
