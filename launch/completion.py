"""Print a script that completes ziggurat's commands, flags, presets and fields of the config in a shell:

ziggurat completion bash > ~/.local/share/bash-completion/completions/ziggurat
ziggurat completion zsh > ~/.zfunc/_ziggurat        (any folder of $fpath)
ziggurat completion fish > ~/.config/fish/completions/ziggurat.fish
"""

import argparse

from launch.commands import COMMANDS, OVERRIDE, Parser
from launch.presets import presets

# Each script asks this module for the words that may follow the line up to the cursor.
SCRIPTS = {
    "bash": """\
_ziggurat() {
    local line=${COMP_LINE:0:COMP_POINT}
    COMPREPLY=($("$1" completion bash --line="$line" 2>/dev/null))
    # Readline replaces only the part of a word that follows its last =.
    [[ ${line##* } == *=* && $COMP_WORDBREAKS == *=* ]] && COMPREPLY=("${COMPREPLY[@]#*=}")
    [[ ${COMPREPLY[0]} == *= ]] && compopt -o nospace
}
complete -o default -F _ziggurat ziggurat
""",
    "zsh": """\
#compdef ziggurat
local -a candidates
candidates=(${(f)"$(ziggurat completion zsh --line="${(j: :)words[1,CURRENT-1]} $PREFIX" 2>/dev/null)"})
compadd -S '' -- $candidates || _files
""",
    "fish": """\
complete -c ziggurat -a '(ziggurat completion fish --line=(commandline -cp | string collect) 2>/dev/null)'
""",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `ziggurat completion`."""
    parser.add_argument("shell", choices=list(SCRIPTS), help="the shell that reads the script")
    parser.add_argument("--line", help=argparse.SUPPRESS)


def run(arguments: argparse.Namespace) -> int:
    """Prints the script, or for --line the words that complete it."""
    if arguments.line is None:
        print(SCRIPTS[arguments.shell], end="")
    else:
        print("\n".join(candidates(arguments.line)))
    return 0


def candidates(line: str) -> list[str]:
    """Returns the words that may stand at the end of a command line, whose last word is unfinished or empty."""
    *words, current = line.split(" ")
    words = [word for word in words[1:] if word]
    if "--" in words:
        # `launch` takes a command of ziggurat after --.
        words = words[words.index("--") + 1 :]
    command = next((name for name in (" ".join(words[:2]), " ".join(words[:1])) if name in COMMANDS), None)
    if command is None:
        depth = len(words)
        names = [name.split() for name in COMMANDS]
        following = {name[depth] for name in names if len(name) > depth and name[:depth] == words}
    else:
        following = set(flags(command, with_fields=current.startswith(OVERRIDE)))
    return sorted(word for word in following if word.startswith(current))


def flags(command: str, with_fields: bool) -> list[str]:
    """Returns the flags of a command; those that take a value end with =, or with each value where there are few."""
    texts = []
    for action in Parser(command).options:
        flag = action.option_strings[-1]
        if action.help == argparse.SUPPRESS or (flag.startswith(OVERRIDE) and not with_fields):
            continue
        values = presets() if flag == "--config" else action.choices
        if values:
            texts += [f"{flag}={value}" for value in values]
        else:
            texts.append(flag if action.nargs == 0 else f"{flag}=")
    return texts
