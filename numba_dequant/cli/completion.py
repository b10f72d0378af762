"""`numba-dequant completion`: scripts that complete arguments in a shell, written from the parser."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numba_dequant as nd
from numba_dequant.cli.common import add_command
from numba_dequant.dtypes import NAMES

PROGRAM = "numba-dequant"

DEVICES = ("cpu", "cuda", "reference")
ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")


@dataclass(frozen=True)
class Values:
    """What an argument may be.

    Attributes:
        words: words that are suggested.
        files: whether files are suggested: ".gguf" for those with this suffix, "*" for all, or "".
        is_list: whether it is a list of words, separated by commas.
    """

    words: tuple[str, ...] = ()
    files: str = ""
    is_list: bool = False


def known_values() -> dict[str, Values]:
    """What the arguments with each metavar may be."""
    formats = tuple(nd.FORMATS)
    decoded = tuple(name for name, fmt in nd.FORMATS.items() if fmt.decode)
    return {
        "FILE": Values(files=".gguf"),
        "OUT": Values(files="*"),
        "FORMAT|FILE": Values(formats, files=".gguf"),
        "A,B": Values(decoded, is_list=True),
        "DEVICE": Values(DEVICES),
        "DTYPE": Values(NAMES),
        "sm_90": Values(ARCHITECTURES),
        **dict.fromkeys(("TENSOR", "GLOB", "SIZE", "N"), Values()),
    }


@dataclass(frozen=True)
class Argument:
    """An argument of a command.

    Attributes:
        options: the names of an option; none for a positional argument.
        help: the text of ``--help``.
        values: what its value may be; None for an option without one.
        is_repeated: whether it may be given several times.
    """

    options: tuple[str, ...]
    help: str
    values: Values | None
    is_repeated: bool


def add_to(commands: Any) -> None:
    """Add the command's arguments."""
    parser = add_command(
        commands,
        "completion",
        run,
        help="complete arguments in a shell",
        description="Print a script that completes arguments. For bash, add "
        f'"source <({PROGRAM} completion bash)" to ~/.bashrc. For zsh, write it to a file _{PROGRAM} in a folder of '
        f"$fpath. For fish, write it to ~/.config/fish/completions/{PROGRAM}.fish.",
        examples=("completion bash", "completion zsh", "completion fish"),
    )
    parser.add_argument("shell", choices=tuple(SCRIPTS), help="the shell")


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    from numba_dequant.cli.main import command_parser

    [commands] = [each for each in command_parser()._actions if isinstance(each, argparse._SubParsersAction)]
    helps = {action.dest: action.help or "" for action in commands._choices_actions}
    described = {name: (helps[name], arguments(parser)) for name, parser in commands.choices.items()}
    for line in SCRIPTS[options.shell](described):
        print(line)
    return 0


def arguments(parser: argparse.ArgumentParser) -> list[Argument]:
    """The arguments of a command."""
    return [_argument(action) for action in parser._actions]


def _argument(action: argparse.Action) -> Argument:
    values: Values | None = None
    if action.choices is not None:
        values = Values(tuple(action.choices))
    elif action.nargs != 0:
        values = known_values()[str(action.metavar)]
    text = (action.help or "") % {"default": action.default}
    is_repeated = isinstance(action, argparse._AppendAction)
    return Argument(tuple(action.option_strings), text, values, is_repeated)


Described = dict[str, tuple[str, list[Argument]]]
"""By command, what it does, and its arguments."""


def _positional(listed: list[Argument]) -> Values:
    """What any of the positional arguments may be."""
    values = [each.values for each in listed if not each.options and each.values is not None]
    files = {each.files for each in values} - {""}
    return Values(
        tuple(word for each in values for word in each.words), "*" if len(files) > 1 else next(iter(files), "")
    )


def _bash(commands: Described) -> Iterator[str]:
    yield "_numba_dequant() {"
    yield "    local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD - 1]} words= files= prefix= line"
    yield "    COMPREPLY=()"
    yield "    if [ $COMP_CWORD -eq 1 ]; then"
    yield f"        words={shlex.quote(' '.join([*commands, '--help', '--version']))}"
    yield "    else"
    yield '        case "${COMP_WORDS[1]} $before" in'
    for name, (_, listed) in commands.items():
        for each in listed:
            if each.options and each.values is not None:
                patterns = "|".join(shlex.quote(f"{name} {option}") for option in each.options)
                yield f"            {patterns}) {_bash_values(each.values)};;"
    yield "            *)"
    yield '                case "${COMP_WORDS[1]} $word" in'
    for name, (_, listed) in commands.items():
        options = " ".join(option for each in listed for option in each.options)
        yield f"                    {name}' -'*) words={shlex.quote(options)};;"
        yield f"                    {name}' '*) {_bash_values(_positional(listed))};;"
    yield from (
        "                esac;;",
        "        esac",
        "    fi",
        "    case $prefix,$word in ,,*,*) prefix=${word%,*},; word=${word##*,};; esac",
        "    while IFS= read -r line; do",
        '        COMPREPLY+=("${prefix#,}$line")',
        '    done < <(compgen -W "$words" -- "$word"',
        '        [ -n "$files" ] && { compgen -d -- "$word"; compgen -f -X "$files" -- "$word"; })',
        '    [ -n "$files" ] && compopt -o filenames 2>/dev/null',
        "    return 0",
        "}",
        f"complete -F _numba_dequant {PROGRAM}",
    )


def _bash_values(values: Values) -> str:
    parts = [f"words={shlex.quote(' '.join(values.words))}"] if values.words else []
    if values.files:
        parts.append("files=" + ("'-'" if values.files == "*" else shlex.quote(f"!*{values.files}")))
    if values.is_list:
        parts.append("prefix=,")
    return "; ".join(parts)


def _zsh(commands: Described) -> Iterator[str]:
    yield f"#compdef {PROGRAM}"
    yield "_numba_dequant() {"
    yield "    local -a names"
    yield "    names=("
    for name, (description, _) in commands.items():
        yield f"        {shlex.quote(f'{name}:{description}')}"
    yield from (
        "    )",
        "    if (( CURRENT == 2 )); then",
        "        _describe command names",
        "        return",
        "    fi",
    )
    yield from ("    local command=$words[2]", "    shift words", "    (( CURRENT-- ))", "    case $command in")
    for name, (_, listed) in commands.items():
        yield f"        {name}) _arguments -s \\"
        for each in listed:
            for option in each.options:
                yield f"            {shlex.quote(_zsh_option(each, option))} \\"
        yield f"            {shlex.quote('*:argument:' + _zsh_values(_positional(listed)))};;"
    yield from ("    esac", "}", "compdef _numba_dequant " + PROGRAM)


def _zsh_option(each: Argument, option: str) -> str:
    text = "".join(f"\\{character}" if character in "[]:\\" else character for character in each.help)
    value = "" if each.values is None else f":value:{_zsh_values(each.values)}"
    return f"{'*' if each.is_repeated else ''}{option}[{text}]{value}"


def _zsh_values(values: Values) -> str:
    words = " ".join(values.words)
    if values.is_list:
        return f"_values -s , value {words}"
    files = "_files" if values.files == "*" else f'_files -g "*{values.files}"'
    if values.files and words:
        return f"{{compadd -- {words}; {files}}}"
    return files if values.files else f"({words})" if words else " "


def _fish(commands: Described) -> Iterator[str]:
    start = f"complete -c {PROGRAM}"
    yield f"{start} -f"
    for name, (description, listed) in commands.items():
        yield f"{start} -n __fish_use_subcommand -a {name} -d {_fish_text(description)}"
        here = f"{start} -n '__fish_seen_subcommand_from {name}'"
        for each in listed:
            names = "".join(
                f" -{'l' if each_name[:2] == '--' else 's'} {each_name.lstrip('-')}" for each_name in each.options
            )
            if each.options:
                value = "" if each.values is None else f" -x{_fish_values(each.values)}"
                yield f"{here}{names}{value} -d {_fish_text(each.help)}"
        if positional := _fish_values(_positional(listed)):
            yield f"{here}{positional}"


def _fish_values(values: Values) -> str:
    if values.is_list:
        return f" -a '(__fish_append , {' '.join(values.words)})'"
    parts = [*values.words]
    if values.files:
        parts.append(f"(__fish_complete_suffix {values.files if values.files != '*' else '.safetensors'})")
    return f" -a {_fish_text(' '.join(parts))}" if parts else ""


def _fish_text(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


SCRIPTS: dict[str, Callable[[Described], Iterator[str]]] = {"bash": _bash, "zsh": _zsh, "fish": _fish}
"""By shell, the lines of its script."""
