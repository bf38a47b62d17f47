"""The READMEs and --help say what is true."""
import dataclasses, re, shlex, sys
from typing import get_args

import pytest

import data
import judging.curate, judging.study, judging.tally, judging.verdict
import sample
import train
from support import page
from support.command import flag, parse
from support.folders import defaults_of
from tests.helpers import REPO
from toy import experiment, judge, make_model

COMMANDS = {"data.py": data, "sample.py": sample, "train.py": train}
for module in (judging.curate, judging.study, judging.tally, judging.verdict, page, experiment, judge, make_model):
    COMMANDS[f"-m {module.__name__}"] = module
# Options of other programs that a README names.
OTHERS = {"help", "nproc_per_node", "shutdown_timeout", "signals_to_handle", "index_url", "nnodes", "rdzv_backend",
          "rdzv_endpoint", "mode", "videos_path", "custom_image_folder", "dimension"}

@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_a_help_line(name, capsys):
    module = COMMANDS[name]
    with pytest.raises(SystemExit):
        parse(module.Options, module.__name__, ["--help"])
    text = capsys.readouterr().out
    assert all(f"[{value}]" in text for value in defaults_of("tiny", module.__name__).values())        # the model's own
    for field in dataclasses.fields(module.Options):       # its name, its values, and there or on the next line a text
        word = field.name if field.default is dataclasses.MISSING else flag(field.name)
        assert re.search(rf"^  {word}\b[^\n]*?(\n {{20,}}|  +)[^-\s]", text, re.MULTILINE), word
        assert all(choice in text for choice in get_args(field.type)), word              # of a Literal

@pytest.mark.parametrize("module, names", [(train, ["beta", "lr", "ema_decay", "batch"]),
                                           (sample, ["negatives", "guidance"])], ids=["train", "sample"])
def test_a_default_is_what_its_help_says_that_the_paper_or_the_release_takes(module, names):
    fields = {field.name: field for field in dataclasses.fields(module.Options)}
    for name in names:
        found = re.search(r"(?:paper|release): ([\d.e-]+)", fields[name].metadata["help"])
        assert float(found[1]) == fields[name].default, name

@pytest.mark.parametrize("name", ["README.md", "support/README.md", "toy/README.md", "judging/README.md"])
def test_a_readme_names_files_functions_commands_and_options_that_exist(name):
    text = (REPO / name).read_text()
    for link in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (REPO / name).parent.joinpath(link).exists(), link
    for module, function in re.findall(r"`(realdpo|model|data|sample|train)\.(?!py)(\w+)`", text):
        assert hasattr(sys.modules[module], function), (module, function)
    commands = re.findall(r"(?:python|torchrun --nproc_per_node \d+) (-m \w+\.\w+|\w+\.py)"
                          r"((?: +(?:--?[\w-]+|\"[^\"\n]*\"|[\w./-]+))*)", text.replace("\\\n", ""))
    assert commands
    for command, arguments in commands:
        parse(COMMANDS[command].Options, COMMANDS[command].__name__, shlex.split(arguments))
    known = {field.name for module in COMMANDS.values() for field in dataclasses.fields(module.Options)}
    for option in re.findall(r"(?<![\w-])--([a-z][\w-]*)", text):
        assert option.replace("-", "_").removeprefix("no_") in known | OTHERS, option
