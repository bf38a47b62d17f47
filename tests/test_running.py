"""Training as people run it: watched while it runs, taken from any checkpoint, alone in its folder, stopped by signals.
"""
import json, os, re, shutil, signal, subprocess, sys, time
from functools import partial
from pathlib import Path

import huggingface_hub
import pytest
import torch

import data
import judging.study
import model
import sample
import train
from model import UserError
from tests.helpers import (REPO, add_negatives, checkpoint, contents, encode, generate_bench, metrics, on_rank,
                           processes, refusal, run_training, same_tensors, spy_on_losses, spy_on_videos)

pytest_plugins = "tests.helpers"

STEPS = ["step-000000", "step-000002", "step-000004"]


# ---- Videos of a bench at every checkpoint --------------------------------------------------------------------------

QUICK = dict(steps=3, guidance=1.0)


@pytest.fixture
def quick(monkeypatch):
    """A model whose own defaults ask for videos in a few steps."""
    defaults = model.defaults_of
    monkeypatch.setattr(model, "defaults_of",
                        lambda path, command: QUICK if command == "sample" else defaults(path, command))


@pytest.fixture(scope="module")
def watched(cache, shots):
    """A run of four steps with videos of a bench at its start, in its middle and at its end."""
    out = cache.parent / "watched"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "defaults_of", lambda path, command: QUICK)
        run_training(out, cache, bench=str(shots), save_every=2)
    return out


def test_a_bench_shows_the_start_every_checkpoint_and_the_end(watched, straight, shots, tmp_path):
    assert sorted(path.name for path in (watched / "videos").iterdir()) == STEPS
    for step, trained in zip(STEPS, ("tiny", watched / "checkpoints" / "step-000002", watched)):
        settings = QUICK | dict(frames=0, solver="multistep")                            # as train.py chooses them
        generate_bench(shots, tmp_path / step, model=str(trained), **settings)
        ours, theirs = contents(watched / "videos" / step), contents(tmp_path / step)
        assert {*ours} == {*theirs} == {"bench.json", "somersault.mp4", "walk-12-0.mp4"}
        if step != "step-000004":                          # which was exported in bf16, while the run shows it in fp32
            assert all(ours[name] == theirs[name] for name in ours if name.endswith(".mp4"))
    starts = [contents(watched / "videos" / step)["somersault.mp4"] for step in STEPS]
    assert len({*starts}) == 3                             # and training changes what one sees
    assert metrics(watched) == [{k: v for k, v in line.items() if "eval" not in k} for line in metrics(straight)]


def test_a_killed_run_makes_the_videos_that_it_did_not_get_to_and_no_others(watched, cache, shots, quick, tmp_path,
                                                                            monkeypatch):
    run = shutil.copytree(watched, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "step-000004")     # killed while it showed step 2
    for name in ("videos/step-000004", "transformer"):
        shutil.rmtree(run / name)
    (run / "videos" / "step-000002" / "walk-12-0.mp4").unlink()
    made = spy_on_videos(monkeypatch)
    run_training(run, cache, bench=str(shots), save_every=2)
    assert made == ["walk-12-0.mp4", "somersault.mp4", "walk-12-0.mp4"]
    assert contents(run / "videos") == contents(watched / "videos")


def test_other_pictures_are_not_mixed_with_those_that_a_run_has_shown(watched, cache, shots, quick, tmp_path,
                                                                      monkeypatch):
    other = shutil.copytree(shots, tmp_path / "other")
    (other / "walk-12.txt").write_text("another caption")
    monkeypatch.setattr(train, "load_models", None)        # not to be called
    with pytest.raises(UserError, match="step-0.*bench.json: was made with other settings: bench "):
        run_training(watched, cache, bench=str(other), save_every=2)


def test_the_autoencoder_is_on_the_device_only_while_it_decodes(cache, shots, tmp_path, monkeypatch):
    """Told by the calls that move it, for here is one device alone."""
    moves, to, step = [], torch.nn.Module.to, train.train_step

    def spy_on_to(net, *where, **options):
        if isinstance(net, model.VAE):
            moves.append("to")
        return to(net, *where, **options)

    def spy_on_cpu(net):
        moves.append("cpu")
        return net

    def spy_on_step(*arguments):
        moves.append("step")
        return step(*arguments)

    monkeypatch.setattr(torch.nn.Module, "to", spy_on_to)
    monkeypatch.setattr(torch.nn.Module, "cpu", spy_on_cpu)
    monkeypatch.setattr(train, "train_step", spy_on_step)
    monkeypatch.setattr(sample, "sample", lambda denoiser, noise, cond, **options: noise)
    run_training(tmp_path / "run", cache, bench=str(shots), steps=1)
    assert moves == ["cpu", "to", "to", "cpu", "step", "to", "to", "cpu"]


def test_previews_are_sampled_as_the_model_asks_and_from_the_same_noise_at_every_checkpoint(cache, shots, tmp_path,
                                                                                            monkeypatch):
    asked = []

    def spy(denoiser, noise, cond, **options):
        asked.append(dict(options, noise=noise, cond=cond))
        return noise

    monkeypatch.setattr(sample, "sample", spy)
    run_training(tmp_path / "run", cache, bench=str(shots), steps=1, seed=5)
    assert {(call["steps"], call["guidance"], call["solver"]) for call in asked} == {(16, 1.0, "multistep")}
    first, again = asked[:2], asked[2:]
    for before, after in zip(first, again, strict=True):
        assert torch.equal(before["noise"], after["noise"]) and torch.equal(before["cond"].image, after["cond"].image)
    assert not torch.equal(first[0]["noise"], first[1]["noise"])
    notes = [json.loads(file.read_text()) for file in (tmp_path / "run" / "videos").glob("*/bench.json")]
    assert len(notes) == 2 and all((note["seed"], note["steps"]) == (5, 16) for note in notes)


def test_a_rank_that_has_no_video_to_make_keeps_pace_with_the_others(shots, tmp_path, monkeypatch):
    """A forward of the policy is a collective: here another rank has two videos left, and this one has one, or none."""
    options = train.Options(model="tiny", bench=str(shots), out=str(tmp_path))
    asked = []
    monkeypatch.setattr(sample, "sample", lambda denoiser, noise, cond, **options: asked.append(noise) or noise)
    monkeypatch.setattr(train.dist, "all_reduce", lambda rounds, most: rounds.fill_(2))
    for rank, name in ((0, "somersault.mp4"), (1, "walk-12-0.mp4"), (2, None)):
        process = data.Process(rank, 3, torch.device("cpu"), torch.float32)
        previews = train.prepare_previews(options, process)
        asked.clear()
        train.make_previews(previews, None, tmp_path / str(rank), process)
        assert len(asked) == 2
        made = {path.name for path in tmp_path.glob(f"{rank}/*.mp4")}
        assert made == ({name} if name else set())
        assert (tmp_path / str(rank) / "bench.json").exists() == (rank == 0)


def test_steps_of_a_run_are_compared_by_raters_like_methods(watched, shots, tmp_path):
    judging.study.main(judging.study.Options(videos=str(watched / "videos"), bench=str(shots),
                                             out=str(tmp_path / "study")))
    assert sorted(json.loads((tmp_path / "study-key.json").read_text())["clips"]) == STEPS


# ---- A checkpoint is a model ----------------------------------------------------------------------------------------

def test_a_checkpoint_and_its_reference_are_models(half, cache, tmp_path, capsys):
    folder, stored = half / "checkpoints" / "step-000002", checkpoint(half, 2)
    for path, kind in ((folder, "model."), (folder / "ref", "ref.")):
        net = model.load_dit(path).net.state_dict()
        names = [name for name in stored if name.startswith(kind)]
        assert {name.removeprefix(kind) for name in names} == net.keys()
        assert all(torch.equal(net[name.removeprefix(kind)], stored[name]) for name in names)
    assert model.defaults_of(folder, "sample") == model.defaults_of("tiny", "sample") != {}
    (first,) = run_training(tmp_path / "on", cache, model=str(folder), steps=1)
    assert first["margin"] == 0                            # a run of its own, with a reference of its own
    assert model.base_of(tmp_path / "on") == "tiny"
    digests = {data.digest(*model.find_transformer(path)) for path in (folder, folder / "ref", "tiny")}
    assert len(digests) == 3


def test_a_run_opens_before_it_has_ended_and_says_so(half, straight, picture, tmp_path, monkeypatch, capsys):
    run = shutil.copytree(half, tmp_path / "run", ignore=shutil.ignore_patterns("transformer", "scheduler"))
    (run / "base.json").unlink()
    last = model.load_dit(run / "checkpoints" / "step-000002").net.state_dict()
    assert same_tensors(model.load_dit(run).net.state_dict(), last)
    monkeypatch.setattr(sys, "argv", ["sample.py", "--model", str(run), "--image", str(picture), "--steps", "1",
                                      "--out", str(tmp_path / "a.mp4")])
    data.command(sample.main, sample.Options, "sample")
    assert "training has not ended; taken as it was at its last checkpoint" in capsys.readouterr().out
    assert model.last_checkpoint(straight) is None         # which has ended


def test_a_run_without_a_checkpoint_yet_is_no_model(cache, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="run has no transformer"):
        model.load_dit(tmp_path / "run")


# ---- The same records, or none --------------------------------------------------------------------------------------

def test_going_on_with_other_records_is_refused_and_with_the_same_elsewhere_goes_on(half, cache, own_cache, tmp_path):
    run = partial(run_training, shutil.copytree(half, tmp_path / "run"))
    assert len(run(own_cache)) == 4                        # the same records, in another folder
    (own_cache / "win" / "00003.safetensors").rename(own_cache / "00003.safetensors")
    with pytest.raises(UserError, match="record 00003 is gone since .*step-000004 was written"):
        run(own_cache, steps=5)
    (own_cache / "00003.safetensors").rename(own_cache / "win" / "00003.safetensors")
    shutil.rmtree(own_cache / "lose")
    add_negatives(own_cache, seed=1)
    with pytest.raises(UserError, match="record 00000 has changed"):
        run(own_cache, steps=5)
    for kind in ("win", "lose"):
        shutil.copy(cache / kind / "00001.safetensors", own_cache / kind / "00001b.safetensors")
        shutil.copy(cache / kind / "00000.safetensors", own_cache / kind / "00000.safetensors")
    shutil.copytree(cache / "lose", own_cache / "lose", dirs_exist_ok=True)
    with pytest.raises(UserError, match="record 00001b is new"):
        run(own_cache, steps=5)


# ---- One owner a folder ---------------------------------------------------------------------------------------------

def hold(folder, held):
    """Own a folder until killed."""
    with data.sole_owner(folder):
        held.set()
        time.sleep(60)


def test_a_second_job_says_who_is_at_work_and_a_killed_one_holds_nobody_up(cache, tmp_path, monkeypatch):
    held = processes.Event()
    first = processes.Process(target=hold, args=(tmp_path / "run", held), daemon=True)
    first.start()
    assert held.wait(60)
    monkeypatch.setattr(train, "train", None)              # not to be called
    command = f"train --model tiny --data {cache} --out {tmp_path / 'run'}".split()
    message = refusal(monkeypatch, *command)
    since = r"since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
    assert re.search(rf"run: process {first.pid} on \S+, {since}, is at work there", message)
    first.kill()
    first.join()
    monkeypatch.undo()
    assert len(run_training(tmp_path / "run", cache, steps=1)) == 1


def test_a_file_system_without_locks_is_named_and_used(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(data.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(data.fcntl, "flock", refuse)
    with data.sole_owner(tmp_path / "run"):
        assert "has no locks" in capsys.readouterr().out


def test_two_jobs_share_a_cache_or_the_second_is_refused(videos, cache, tmp_path, monkeypatch):
    """A job that started a moment before has noted what it makes, and has not written a record yet."""
    out = tmp_path / "cache"
    out.mkdir()
    shutil.copytree(cache / "win", out / "win", ignore=shutil.ignore_patterns("*.safetensors"))
    monkeypatch.setattr(data, "load_vae", None)            # not to be called
    with pytest.raises(UserError, match=r"win/made_by.json: was made with other settings: seed 0 \(now 1\)"):
        encode(videos, out, seed=1)
    monkeypatch.undo()
    jobs = [processes.Process(target=encode, args=(videos, out)) for _ in range(2)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
        assert job.exitcode == 0
    ours, theirs = contents(out), contents(cache)
    assert all(ours[name] == theirs[name] for name in theirs if not name.startswith("lose"))


def test_temporary_names_carry_host_and_process_and_old_ones_go(tmp_path):
    with data.whole_file(tmp_path / "a.json") as part:
        assert str(os.getpid()) in part.name and data.platform.node()[:20] in part.name and part.name[0] == "."
        part.write_text("{}")
    for name, age in ((".old.part", 2), (".new.part", 0)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - 86_400 * age,) * 2)
    data.claim(tmp_path / "made_by.json", {})
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", "made_by.json", ".new.part"}


# ---- The toy and the real run do not meet ---------------------------------------------------------------------------

@pytest.mark.parametrize("argv, gpu, place", [
    ([], False, ("run-tiny", "cache", True)), (["--model", "tiny"], True, ("run-tiny", "cache", True)),
    ([], True, ("run", "cache", False)), (["--model", "tiny", "--data", "mine"], False, ("run-tiny", "mine", False)),
    (["--out", "a"], False, ("a", "cache", True))])
def test_the_toy_has_a_folder_of_its_own(argv, gpu, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("cache", "mine"):
        Path(name).mkdir()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    options = data.parse(train.Options, "train", argv)
    monkeypatch.setattr(train, "init_distributed", lambda: (data.Process(0, 1, torch.device("cpu"), None), None))
    went = []
    monkeypatch.setattr(train, "train", lambda options, *_: went.append((options.out, options.data, False)))
    from toy import laptop
    monkeypatch.setattr(laptop, "run", lambda options, *_: went.append((options.out, options.data, True)))
    monkeypatch.setattr(train.dist, "destroy_process_group", lambda: None)
    train.main(options)
    assert went == [place]


# ---- Signals, and how a command ends --------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["SIGUSR1", "SIGUSR2"])
def test_slurms_signals_end_a_run_like_sigterm(name, straight, cache, tmp_path, monkeypatch, capsys):
    number = getattr(signal, name)
    before = signal.getsignal(number)

    def send(count, loss):
        if count == 2:
            os.kill(os.getpid(), number)
        return loss

    spy_on_losses(monkeypatch, send)
    assert len(run_training(tmp_path / "run", cache)) == 2
    assert "the same command continues" in capsys.readouterr().out
    assert same_tensors(checkpoint(tmp_path / "run", 2), checkpoint(straight, 2))
    assert signal.getsignal(number) == before


def first_setting(name, environment):
    """GOMP_SPINCOUNT as it is when the module `name` loads torch, which is when OpenMP's runtime reads it."""
    script = ("import os, sys\n"
              "class Finder:\n"
              "    def find_spec(self, name, *_):\n"
              "        if name == 'torch':\n"
              "            print(os.environ['GOMP_SPINCOUNT'], flush=True)\n"
              "            os._exit(0)\n"
              f"sys.meta_path.insert(0, Finder())\nimport {name}")
    done = subprocess.run([sys.executable, "-c", script], cwd=REPO, env=environment, stdout=subprocess.PIPE, text=True,
                          check=True)
    return done.stdout.strip()


@pytest.mark.parametrize("name", ["model", "data", "sample", "train", "judging.curate", "judging.study",
                                  "judging.tally", "judging.verdict", "toy.judge", "toy.make_model", "toy.experiment",
                                  "toy.laptop"])
def test_openmp_is_told_before_torch_is_loaded_and_the_users_word_counts(name):
    environment = {key: value for key, value in os.environ.items() if key != "GOMP_SPINCOUNT"}
    assert first_setting(name, environment) == "1000"
    if name == "model":                                    # where it is set, for all
        assert first_setting(name, environment | {"GOMP_SPINCOUNT": "7"}) == "7"


def end_of(monkeypatch, error):
    """The line with which a command ends whose work raises `error`."""
    def work(options):
        raise error

    monkeypatch.setattr(sys, "argv", ["data.py", "--model", "tiny"])
    with pytest.raises(SystemExit) as stopped:
        data.command(work, data.Options, "data")
    return stopped.value.code


@pytest.mark.parametrize("error, line", [
    (UserError("a mistake"), "^error: a mistake$"), (KeyboardInterrupt(), "^interrupted; nothing finished is lost"),
    (RuntimeError("Connection closed by peer"), "^another rank has gone"),                                 # gloo
    (RuntimeError("ncclRemoteError: a remote process exited"), "^another rank has gone")])                 # NCCL
def test_a_command_ends_in_a_line_and_a_status(error, line, monkeypatch):
    assert re.search(line, end_of(monkeypatch, error))


def test_a_command_whose_reader_has_gone_ends_without_a_word(monkeypatch):
    """Such as | head. What Python still has to flush must not fail again."""
    silenced = []
    monkeypatch.setattr(os, "dup2", lambda _, stream: silenced.append(stream))
    assert end_of(monkeypatch, BrokenPipeError()) == 1 and silenced == [sys.stdout.fileno()]


def test_a_mistake_of_ours_ends_in_a_traceback(monkeypatch):
    with pytest.raises(RuntimeError, match="of the sizes"):
        end_of(monkeypatch, RuntimeError("of the sizes"))


def test_other_ranks_leave_it_to_rank_0_to_say_what_every_rank_finds(monkeypatch):
    waited = []
    monkeypatch.setattr(data.time, "sleep", waited.append)
    monkeypatch.setattr(data.signal, "signal", lambda number, action: waited.append((number, action)))
    on_rank(monkeypatch, 0, 2)
    assert end_of(monkeypatch, UserError("a mistake")) and not waited
    on_rank(monkeypatch, 1, 2)
    assert end_of(monkeypatch, UserError("a mistake"))
    assert waited == [(signal.SIGTERM, signal.SIG_DFL), 3]


def test_only_rank_0_speaks(monkeypatch, capsys):
    for rank in (1, 0):
        on_rank(monkeypatch, rank, 2)
        data.say(f"rank {rank}")
    assert capsys.readouterr().out == "rank 0\n"


# ---- A download that was cut off ------------------------------------------------------------------------------------

@pytest.mark.parametrize("part, load", [("transformer/config.json", model.load_dit), ("scheduler", model.load_dit),
                                        ("vae", model.load_vae), ("tokenizer", model.load_text_encoder)])
def test_a_part_that_a_download_lacks_is_named(part, load, folder, tmp_path, monkeypatch):
    snapshot = shutil.copytree(folder, tmp_path / "snapshot")
    gone = snapshot / part
    if gone.is_dir():
        shutil.rmtree(gone)
    else:
        gone.unlink()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(snapshot))   # offline, of its cache
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"^owner/name: .*snapshot has no {part}; ") as caught:
        load("owner/name")
    assert "\n" not in str(caught.value)


SRUN = """#!/bin/bash
shift  # --kill-on-bad-exit
for rank in 0 1; do SLURM_PROCID=$rank SLURM_LOCALID=$rank "$@" & pids="$pids $!"; done
trap 'kill -USR1 $pids' USR1
status=0
for pid in $pids; do
    wait $pid; code=$?
    while [ $code = 138 ] && kill -0 $pid 2>/dev/null; do wait $pid; code=$?; done     # 128 + SIGUSR1: the trap ran
    [ $code = 0 ] || status=$code
done
exit $status
"""


@pytest.mark.slow
def test_the_slurm_script_saves_at_the_signal_and_asks_to_be_queued_again(cache, tmp_path):
    """With stubs of srun, which starts two ranks here, and of scontrol, which notes what it is asked."""
    shutil.copytree(REPO, tmp_path / "repo", ignore=shutil.ignore_patterns(".git", "run*", "__pycache__"))
    (tmp_path / "bin").mkdir()
    scontrol = f'#!/bin/bash\n[ "$1" = show ] && echo 127.0.0.1 || echo "$@" >> {tmp_path}/asked\n'
    for name, text in (("srun", SRUN), ("scontrol", scontrol)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    path = f"{tmp_path}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | dict(PATH=path, SLURM_NTASKS="2", SLURM_JOB_ID="7", SLURM_JOB_NUM_NODES="1",
                                    SLURM_JOB_NODELIST="here", OUT=str(tmp_path / "run"))
    options = f"--model tiny --data {cache} --batch 4 --save-every 900 --decay 0"
    command = ["bash", "assets/train.slurm", *options.split()]
    job = subprocess.Popen([*command, "--steps", "5000"], cwd=tmp_path / "repo", env=environment)
    log = tmp_path / "run" / "metrics.jsonl"
    while job.poll() is None and not (log.is_file() and log.read_text()):
        time.sleep(0.1)
    subprocess.run(["pkill", "-USR1", "-P", str(job.pid)], check=True)      # as SLURM signals a job's steps
    assert job.wait(timeout=120) == 0
    done = len(metrics(tmp_path / "run"))
    assert 0 < done < 5000 and (tmp_path / "run" / "checkpoints" / f"step-{done:06d}").is_dir()
    assert (tmp_path / "asked").read_text() == "requeue 7\n"
    assert subprocess.run([*command, "--steps", str(done + 1)], cwd=tmp_path / "repo", env=environment).returncode == 0
    assert (tmp_path / "run" / "transformer").is_dir() and (tmp_path / "asked").read_text() == "requeue 7\n"
