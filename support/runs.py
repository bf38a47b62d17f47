"""Which training run a folder holds, and where it goes on: a run that was interrupted equals one that never was."""
import json, shutil
from dataclasses import asdict
from pathlib import Path
from shlex import quote

from support import UserError
from support.files import FORMAT, differences, read_json, visible, write_json
from support.folders import ADAPTERS, base_of, checkpoints_of, is_checkpoint

# Options that may change when a run goes on: they decide where and how it runs, not what a step does.
MAY_CHANGE = {"data", "out", "resume", "steps", "save_every", "checkpointing", "graphs", "micro_batch", "compile",
              "eval_data", "bench", "dry_run"}
# What a run writes into --out. Where one of these is there without run.json, it is not a run's.
WRITTEN = ("transformer", "scheduler", ADAPTERS, "metrics.jsonl", "checkpoints", "videos/step-*", "base.json", "done")


def refuse_others(out):
    """Raise UserError if --out holds something that a run would write, but no run."""
    there = [path for pattern in WRITTEN for path in visible(out, pattern)]
    if there and not (Path(out) / "run.json").exists():
        raise UserError(f"{there[0]}: is there, and not of a run that these options go on with; choose another --out")


def choose_checkpoint(out, resume):
    """(checkpoint, its step) to continue from: the last in --out, else --resume, else (None, 0). Raises UserError for a
    --resume that is no checkpoint, or not the one from which the run in --out goes on."""
    note = Path(out) / "run.json"
    begun = read_json(note)["resume"] if note.exists() else ""
    own = [str(folder.resolve()) for folder in checkpoints_of(out)]
    if resume:
        path = Path(resume)
        if not is_checkpoint(path):
            near = [checkpoints_of(place) for place in (path, path.parent, path.parent.parent, out)]
            there = max(near, key=len) or ["RUN/checkpoints/step-000200"]
            raise UserError(f"--resume {path}: is no checkpoint; expected a folder such as {', '.join(map(str, there))}")
        resume = str(path.resolve())
        if note.exists() and resume not in (begun, *own[-1:]):
            raise UserError(f"--resume {path}: {out} goes on from {' '.join(own[-1:]) or begun or 'its beginning'}; leave "
                            "--resume out, or choose another --out")
    chosen = (own[-1:] + [resume or begun])[0]
    return (Path(chosen), read_json(Path(chosen) / "checkpoint.json")["step"]) if chosen else (None, 0)


def begin_run(options, records, steps, last_rate, rank):
    """Note in RUN/run.json what a run is: its options, the hashes of its `records`, its number of steps. If it is there,
    check that it is the same; an option that it does not have counts as its default. `last_rate(steps)` is the learning
    rate of the last step that was made, in a run of that many. Raises UserError with the first difference."""
    note = Path(options.out) / "run.json"
    settings = {name: value for name, value in asdict(options).items() if name not in MAY_CHANGE}
    resume = str(Path(options.resume).resolve()) if options.resume else ""
    if note.exists():
        saved = read_json(note)
        different = differences(asdict(type(options)()) | saved, settings)
        for name in sorted({*saved["records"], *records}):
            if saved["records"].get(name) != records.get(name):
                different.append(f"another record {name}: it has changed, is new or is gone")
        if last_rate(saved["steps"]) != last_rate(steps):
            different.append(f"steps {saved['steps']} (now {steps}), at whose end the rate has begun to fall")
        if different:
            trained = " and its trained transformer/" if note.with_name("transformer").exists() else ""
            raise UserError(f"{options.out}: holds a run{trained}, with {different[0]}; go on with the same, or choose "
                            "another --out, with --resume to start from a checkpoint of it")
        resume = saved["resume"]
    if rank == 0:
        write_json(note, dict(settings, format=FORMAT, steps=steps, resume=resume, records=records))


def has_ended(out, done, steps):
    """Whether nothing is left to do in a run of `steps`, of which `done` are in its last checkpoint. Raises UserError
    for one that has ended, is to go on and cannot."""
    file = Path(out) / "done"
    ended = read_json(file)["steps"] if file.exists() else 0
    if ended and done < ended < steps:
        raise UserError(f"{out}: has ended after {ended} steps, and its checkpoints are gone; to train its model further: "
                        f"--model {quote(str(out))} and another --out")
    return ended and steps <= ended


def withdraw_export(out):
    """Take away RUN/done and the exported transformer, since the run goes on."""
    for name in ("done", "transformer", "scheduler", ADAPTERS):
        path = Path(out) / name
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)


def note_base(folder, path):
    """Write base.json into a folder with weights: the model that has the parts it lacks, such as the autoencoder."""
    base = Path(base_of(path)[0])
    write_json(folder / "base.json", {"model": str(base.resolve() if base.is_dir() else base)})


def open_log(file, first):
    """Open metrics.jsonl for appending, without the lines of steps that will be done again."""
    lines = file.read_text().splitlines() if file.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]      # a killed run may leave half a line
    write_json(file, *[row for row in rows if row["step"] < first])
    return open(file, "a")
