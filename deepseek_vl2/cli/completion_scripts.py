"""The scripts of ``deepseek-vl2 completion``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from shlex import quote
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deepseek_vl2.cli.completion import CommandWords, Option

LONGEST = 70  # characters of an option's help

BASH = """\
# Completes {program} in bash: eval "$({program} completion bash)"
_deepseek_vl2() {{
    local cur="${{COMP_WORDS[COMP_CWORD]}}" command="" option="" values="" takes="file" many="" distance=0 index word
    COMPREPLY=()
    [[ $cur == "=" ]] && cur=""
    for ((index = 1; index < COMP_CWORD; index++)); do
        word="${{COMP_WORDS[index]}}"
        [[ $word == "=" ]] && continue
        if [[ -z $command ]]; then
            [[ $word == -* ]] || command="$word"
        elif [[ $word == -?* ]]; then
            option="$word"
            distance=0
        else
            distance=$((distance + 1))
        fi
    done
    # Options may be written with hyphens or underscores; they are declared with underscores.
    [[ $option == --* ]] && option="--$(printf '%s' "${{option#--}}" | tr - _)"
    local flags="--help --version --traceback" arguments="words" words="{commands}"
    case "$command" in
{cases}
    esac
    if [[ $cur == -* ]]; then
        [[ $cur == --*-* ]] && flags="--$(printf '%s' "${{flags#--}}" | sed 's/ --/ @@/g; s/_/-/g; s/@@/--/g')"
        COMPREPLY=($(compgen -W "$flags" -- "$cur"))
        return
    fi
    case "$command $option" in
{values}
        *) option="" ;;
    esac
    if [[ -z $option || $takes == nothing || ( -z $many && $distance -gt 0 ) ]]; then
        takes="$arguments"
        values="$words"
    fi
    case "$takes" in
        words) COMPREPLY=($(compgen -W "$values" -- "$cur")) ;;
        model) COMPREPLY=($(compgen -W "$values" -- "$cur") $(compgen -d -- "$cur")) ;;
        text) compopt +o default 2> /dev/null ;; # a number: no file; bash 3.2 has no compopt
    esac
}}
complete -o default -F _deepseek_vl2 {program}
"""

ZSH = """\
#compdef {program}
# Completes {program} in zsh: source <({program} completion zsh)
_deepseek_vl2() {{
    local cur="${{words[CURRENT]}}" command="" option="" takes="words" many="" index word
    local -i distance=0
    local -a flags values named
    for ((index = 2; index < CURRENT; index++)); do
        word="${{words[index]}}"
        if [[ -z $command ]]; then
            [[ $word == -* ]] || command="$word"
        elif [[ $word == -?* ]]; then
            option="$word"
            distance=0
        else
            distance+=1
        fi
    done
    [[ $option == --* ]] && option="--${{${{option#--}}//-/_}}"
    if [[ -z $command ]]; then
        named=({commands})
        flags=('--help:show the help' '--version:show the version' '--traceback:show where an error arose')
        if [[ $cur == -* ]]; then _describe -o option flags; else _describe command named; fi
        return
    fi
    local arguments="file"
    case "$command" in
{cases}
    esac
    if [[ $cur == -* ]]; then
        _describe -o option flags
        return
    fi
    local -a found
    case "$command $option" in
{values}
        *) option="" ;;
    esac
    if [[ -z $option || $takes == nothing || ( -z $many && $distance -gt 0 ) ]]; then
        takes="$arguments"
    else
        values=($found)
    fi
    case "$takes" in
        words) compadd -- $values ;;
        model) compadd -- $values; _files -/ ;;
        file) _files ;;
    esac
}}
if [[ $funcstack[1] == _deepseek_vl2 ]]; then
    _deepseek_vl2 "$@"
else
    compdef _deepseek_vl2 {program}
fi
"""


def short_help(text: str) -> str:
    """Return the beginning of an option's help, without what a shell may take for its own."""
    text = re.sub(r"[`$\\\"':%]", "", text)
    return text if len(text) <= LONGEST else text[: LONGEST - 1].rpartition(" ")[0] + " …"


def bash_script(program: str, commands: Sequence[CommandWords]) -> str:
    """Return the script for bash, 3.2 or later."""
    cases, values = [], []
    for command in commands:
        flags = " ".join(flag for option in command.options for flag in option.flags)
        words = " ".join(command.arguments.values)
        cases.append(
            f'        {command.name}) flags="{flags}"; arguments="{command.arguments.takes}"; words="{words}" ;;'
        )
        values += [value_case(command.name, option, 'values="{}"') for option in command.options]
    names = " ".join(command.name for command in commands)
    return BASH.format(program=program, commands=names, cases="\n".join(cases), values="\n".join(values))


def zsh_script(program: str, commands: Sequence[CommandWords]) -> str:
    """Return the script for zsh, to be sourced or to be put into a directory of ``$fpath``."""
    cases, values = [], []
    for command in commands:
        flags = " ".join(
            quote(f"{flag}:{short_help(option.help)}") for option in command.options for flag in option.flags
        )
        words = " ".join(quote(value) for value in command.arguments.values)
        cases.append(
            f'        {command.name}) flags=({flags}); arguments="{command.arguments.takes}"; values=({words}) ;;'
        )
        values += [value_case(command.name, option, "found=({})") for option in command.options]
    named = " ".join(quote(f"{command.name}:{short_help(command.summary)}") for command in commands)
    return ZSH.format(program=program, commands=named, cases="\n".join(cases), values="\n".join(values))


def value_case(command: str, option: Option, assignment: str) -> str:
    """Return the line that says what may follow an option."""
    patterns = "|".join(f'"{command} {flag}"' for flag in option.flags)
    many = "; many=1" if option.many else ""
    return f'        {patterns}) takes="{option.takes}"; {assignment.format(" ".join(option.values))}{many} ;;'


def fish_script(program: str, commands: Sequence[CommandWords]) -> str:
    """Return the script for fish."""
    lines = [
        f"# Completes {program} in fish",
        f"complete -c {program} -e",
        f"complete -c {program} -n __fish_use_subcommand -f",
    ]
    first = f"complete -c {program} -n __fish_use_subcommand"
    lines += [f"{first} -l help", f"{first} -l version", f"{first} -l traceback"]
    for command in commands:
        lines.append(f"{first} -a {command.name} -d {quote(short_help(command.summary))}")
        seen = f"complete -c {program} -n '__fish_seen_subcommand_from {command.name}'"
        if command.arguments.takes in ("words", "model"):
            directories = " (__fish_complete_directories)" * (command.arguments.takes == "model")
            lines.append(f"{seen} -f -a '{' '.join(command.arguments.values)}{directories}'")
        lines += [f"{seen} {fish_option(option)}" for option in command.options]
    return "\n".join(lines) + "\n"


def fish_option(option: Option) -> str:
    """Return an option as fish's ``complete`` takes it."""
    named = " ".join(f"-l {flag[2:]}" if flag.startswith("--") else f"-s {flag[1:]}" for flag in option.flags)
    values = " ".join(option.values)
    after = {
        "nothing": "-f",
        "words": f"-x -a '{values}'",
        "model": f"-x -a '{values} (__fish_complete_directories)'",
        "file": "-r -F",
        "text": "-x",
    }[option.takes]
    return f"{named} {after} -d {quote(short_help(option.help))}"
