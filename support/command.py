"""A command line from a dataclass of options, a mistake in one line, and this process among its equals."""
import argparse, hashlib, os, shutil, signal, sys, threading, time
from collections import namedtuple
from contextlib import contextmanager
from dataclasses import MISSING, field, fields
from functools import partial
from pathlib import Path
from shlex import quote
from typing import get_args

from support import UserError
from support.folders import HUB_MODEL, defaults_of, last_checkpoint
import torch

KINDS = {str: dict(type=os.path.expanduser, metavar="STR"), int: dict(type=int, metavar="INT"),
         float: dict(type=float, metavar="FLOAT"), list: dict(nargs="+", metavar="FILE"),
         bool: dict(action=argparse.BooleanOptionalAction)}

# One of `world_size` processes, with its device and the dtype in which its networks compute.
Process = namedtuple("Process", "rank world_size device dtype")

def option(default=MISSING, help="", group=None, least=None):
    """A field of an Options class; without a default, a positional argument. `group` begins a section of --help."""
    return field(default=default, metadata=dict(help=help, group=group, least=least))

def flag(name):
    """A field of Options on the command line: ema_every -> --ema-every."""
    return "--" + name.replace("_", "-")

def flags(values):
    """{option: value} as a command line: --steps 8 --guidance 1.0."""
    return " ".join(f"{flag(name)} {quote(str(value))}" for name, value in values.items())

def default_model():
    """The model if no --model is given, and why."""
    if torch.cuda.is_available():
        return HUB_MODEL, "a GPU is here"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if torch.version.cuda and not hidden and Path("/proc/driver/nvidia/version").exists():
        raise UserError(f"torch (for CUDA {torch.version.cuda}) cannot use this GPU's driver; update it or install a "
                        "torch for an older CUDA; on the CPU: CUDA_VISIBLE_DEVICES=")
    return "tiny", "no GPU is here" if torch.version.cuda else "this torch is for CPUs"

def parse(options, name, argv=None):
    """The command line of NAME.py as an instance of `options`. The model may bring defaults of its own."""
    style = partial(argparse.RawDescriptionHelpFormatter, max_help_position=28, width=118)
    parser = argparse.ArgumentParser(description=options.__doc__, allow_abbrev=False, formatter_class=style)
    parser.error = lambda message: sys.exit(f"error: {message}; {' '.join(parser.format_usage().split())}")
    defaults = {each.name: each.default for each in fields(options)}
    if "model" in defaults:
        first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        first.add_argument("--model", default=default_model()[0])
        defaults["model"] = first.parse_known_args(argv)[0].model
        defaults |= defaults_of(defaults["model"], name)
    section = parser
    for each in fields(options):
        if each.metadata["group"]:
            section = parser.add_argument_group(each.metadata["group"])
        help, default = each.metadata["help"].replace("%", "%%"), defaults[each.name]
        if default is MISSING:
            section.add_argument(each.name, type=each.type, help=help)
            continue
        if default not in ("", 0, ()):
            help += f" [{default}]"
        kind = KINDS.get(each.type) or dict(choices=get_args(each.type))                       # else a Literal
        section.add_argument(flag(each.name), default=default, help=help, **kind)
    given = vars(parser.parse_args(argv))
    for each in fields(options):
        least = each.metadata["least"]
        if least is not None and given[each.name] < least:
            raise UserError(f"{flag(each.name)} {given[each.name]}: expected at least {least}")
    if given.get("compile") and not shutil.which(os.environ.get("CXX", "g++")) and not shutil.which("clang++"):
        raise UserError("--compile: needs a C++ compiler; install g++ or leave --compile out")
    return options(**given)

def changed(options):
    """{option: value} of those, but the model, that are not the program's defaults."""
    given = {each.name: getattr(options, each.name) for each in fields(options) if each.name != "model"}
    return {name: value for name, value in given.items() if value != getattr(type(options), name)}

def say(message):
    """Print once, however many processes there are."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(message, flush=True)

def command(main, options, name):
    """Run `main(options)` of NAME.py. A user's mistake ends in one line and status 1."""
    for stream in sys.stdout, sys.stderr:
        stream.reconfigure(errors="replace")               # a console that cannot print ω prints ?
    try:
        options = parse(options, name)
        if hasattr(options, "model"):
            default, why = default_model()
            say(f"model: {options.model} ({why if options.model == default else '--model'})\n"
                f"options: {flags(changed(options)) or 'the defaults'}")
            checkpoint = last_checkpoint(options.model)
            if checkpoint:                                 # looked up once, since a run may go on meanwhile
                say(f"{options.model}: training has not ended; taken as it was at its last checkpoint, {checkpoint}")
                options.model = str(checkpoint)
        main(options)
    except UserError as e:
        # Most mistakes are found by all ranks. Rank 0 reports them, and torchrun ends the others meanwhile.
        if int(os.environ.get("RANK", 0)) > 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(3)
        sys.exit(f"error: {e}")
    except torch.OutOfMemoryError as e:
        sys.exit(f"error: the GPU's memory ran out ({str(e).partition('.')[0]}); use more GPUs or, in training, "
                 "--checkpointing full, --graphs one, --micro-batch 1 or --rank 64; see --dry-run")
    except RuntimeError as e:                              # gloo's and NCCL's words for a lost peer
        if os.environ.get("WORLD_SIZE", "1") == "1" or not ("by peer" in str(e) or "remote process" in str(e)):
            raise
        sys.exit("another rank has gone, so this one ends too; its own last line says why")
    except KeyboardInterrupt:
        sys.exit("interrupted; what is finished stays, and the same command does the rest")

def this_process():
    """This Process, alone or under torchrun. Raises UserError if a launcher's variables or GPUs are missing."""
    names = "RANK", "WORLD_SIZE", "LOCAL_RANK"
    given = [name for name in names if name in os.environ]
    if given and len(given) < len(names):
        raise UserError(f"the environment has {' and '.join(given)}, but not all of {', '.join(names)}: start this "
                        f"with torchrun, or alone, after: unset {' '.join(given)}")
    rank, world_size, local = [int(os.environ[name]) for name in names] if given else (0, 1, 0)
    if not torch.cuda.is_available():
        return Process(rank, world_size, torch.device("cpu"), torch.float32)
    if local >= torch.cuda.device_count():
        raise UserError(f"--nproc_per_node needs {local + 1} GPUs or more, this machine has {torch.cuda.device_count()}")
    torch.cuda.set_device(local)
    if torch.cuda.get_device_capability() < (8, 0):        # no fast bf16, and fp16 overflows
        raise UserError(f"{torch.cuda.get_device_name()}: has no bf16 arithmetic, which the networks need; use an "
                        "Ampere or a later one, or the CPU: CUDA_VISIBLE_DEVICES=")
    return Process(rank, world_size, torch.device("cuda", local), torch.bfloat16)

def generator(*key):
    """A CPU generator seeded by `key` alone: the same numbers on any device and any number of ranks."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big"))

@contextmanager
def stop_signals():
    """Yield an Event that is set when this process shall finish its step, save and exit: by SIGTERM (pre-emption),
    SIGUSR1 or 2 (SLURM), SIGHUP (ssh; nohup ignores it) or Ctrl-C, of which a second one ends it at once."""
    stop = threading.Event()

    def finish_step(number, _):
        stop.set()
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    numbers = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP
    before = {number: signal.getsignal(number) for number in numbers}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, finish_step)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
