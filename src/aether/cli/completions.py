"""`aether completions`: a completion script, derived from the table of verbs and each verb's own parser."""

from __future__ import annotations

import argparse

from aether.cli.arguments import Parser
from aether.cli.main import LOG_FORMATS, LOG_LEVELS, load, verbs
from aether.cli.output import write

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from aether.cli.arguments import Arguments
    from aether.cli.context import Context


def configure(parser: Parser) -> None:
    parser.add_argument("--shell", choices=("bash", "zsh", "fish"), required=True, help="the shell to complete in")


def run(arguments: Arguments, context: Context) -> int:
    makers = {"bash": bash, "zsh": zsh, "fish": fish}
    write(makers[arguments.shell](commands()))
    return 0


class Option:
    """A flag or a positional with fixed words. `values` are its choices; `is_path` says that files are meant."""

    __slots__ = ("flags", "is_path", "line", "takes_value", "values")

    def __init__(self, action: argparse.Action) -> None:
        self.flags = list(action.option_strings)
        self.values = [str(choice) for choice in action.choices or ()]
        self.line = "" if action.help in (None, argparse.SUPPRESS) else str(action.help)
        self.takes_value = action.nargs != 0
        self.is_path = not {"DIR", "FILE"}.isdisjoint(str(action.metavar).split("|"))


class Command:
    """A path of words such as `apps delete` with what may follow."""

    __slots__ = ("actions", "line", "options", "words")

    def __init__(self, words: tuple[str, ...], line: str, parser: Parser) -> None:
        self.words = words
        self.line = line
        elsewhere = ("action", "log_level", "log_format")
        self.options = [Option(action) for action in parser.options if action.dest not in elsewhere]
        self.actions = {name: child.description or "" for name, child in parser.actions.items()}


def commands() -> list[Command]:
    """Every verb and every action of a verb."""
    found: list[Command] = []
    for verb, line in verbs().items():
        parser = Parser(prog=f"aether {verb}")
        load(verb).configure(parser)
        found.append(Command((verb,), line, parser))
        for name, child in parser.actions.items():
            found.append(Command((verb, name), (child.description or "").rstrip("."), child))
    return found


def _words(items: Iterable[str]) -> str:
    return " ".join(items)


def _flags(command: Command) -> list[str]:
    return [flag for option in command.options for flag in option.flags]


def bash(found: list[Command]) -> str:
    """A script for bash 3 and later, without helpers that may be missing."""
    cases: list[str] = []
    values: list[str] = []
    for command in found:
        key = _words(command.words)
        folders = any(option.is_path and not option.flags for option in command.options)
        words = _words([*command.actions, *_flags(command)])
        cases.append(f"    '{key}') words='{words}'; files={int(folders)};;")
        for option in command.options:
            for flag in option.flags if option.takes_value else ():
                what = f"words='{_words(option.values)}'; files={int(option.is_path)}"
                values.append(f"    '{key} {flag}') {what}; return 0;;")
    groups = _words(command.words[0] for command in found if command.actions)
    return _BASH.format(
        verbs=_words(verbs()),
        groups=groups.replace(" ", "|"),
        cases="\n".join(cases),
        values="\n".join(values),
        levels=_words(LOG_LEVELS),
        formats=_words(LOG_FORMATS),
    )


_BASH = """\
# bash completion for aether; load with: source <(aether completions --shell bash)
_aether_value() {{
  case $1 in
    *' --log-level') words='{levels}'; return 0;;
    *' --log-format') words='{formats}'; return 0;;
{values}
  esac
  return 1
}}
_aether() {{
  local current=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} key='' words='' files=0 skip=0 i word
  for ((i = 1; i < COMP_CWORD; i++)); do
    word=${{COMP_WORDS[i]}}
    if ((skip)); then skip=0; continue; fi
    case $word in
      --log-level|--log-format) skip=1;;
      -*) ;;
      *)
        if [[ -z $key ]]; then key=$word
        else case $key in {groups}) key="$key $word";; esac; break; fi;;
    esac
  done
  if ! _aether_value "$key $before"; then
    case $key in
    '') words='{verbs} --log-level --log-format --version --help';;
{cases}
    esac
    [[ -n $key ]] && words="$words --log-level --log-format"
  fi
  COMPREPLY=($(compgen -W "$words" -- "$current"))
  if ((files)) && [[ $current != -* ]]; then COMPREPLY+=($(compgen -f -- "$current")); fi
}}
complete -F _aether aether"""


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


def zsh(found: list[Command]) -> str:
    """A script for zsh's completion system; works sourced and from $fpath."""
    lines = ["#compdef aether", "_aether() {", "  local -a verbs=("]
    lines += [f"    {_quoted(f'{verb}:{line}')}" for verb, line in verbs().items()]
    lines += ["  )"]
    lines += [
        "  local -a globals=("
        f"'--log-level[messages on stderr]:level:({_words(LOG_LEVELS)})' "
        f"'--log-format[their format]:format:({_words(LOG_FORMATS)})')"
    ]
    lines += ["  if (( CURRENT == 2 )); then _describe command verbs; _arguments $globals; return; fi"]
    lines += ["  local key=$words[2]"]
    for command in (command for command in found if command.actions):
        names = "|".join(command.actions)
        lines.append(f'  [[ $key == {command.words[0]} && $words[3] == ({names}) ]] && key="$key $words[3]"')
    lines += ["  case $key in"]
    for command in found:
        lines.append(f"    {_quoted(_words(command.words))})")
        if command.actions:
            shown = " ".join(_quoted(f"{name}:{line}") for name, line in command.actions.items())
            lines.append(f"      local -a actions=({shown}); (( CURRENT == 3 )) && _describe action actions")
        specs = [spec for option in command.options for spec in _zsh_specs(option)]
        lines.append("      _arguments $globals " + " ".join(specs) + " ;;")
    lines += ["  esac", "}"]
    lines += ['if [ "$funcstack[1]" = "_aether" ]; then _aether "$@"; else compdef _aether aether; fi']
    return "\n".join(lines)


def _zsh_specs(option: Option) -> list[str]:
    line = option.line.replace("[", "(").replace("]", ")").replace(":", " -")
    value = f"({_words(option.values)})" if option.values else "_files" if option.is_path else " "
    if not option.flags:
        return [_quoted(f"*:{line or 'argument'}:{value}")]
    tail = f":value:{value}" if option.takes_value else ""
    return [_quoted(f"{flag}[{line}]{tail}") for flag in option.flags]


def fish(found: list[Command]) -> str:
    """A script of `complete` commands."""
    lines = ["# fish completion for aether", "complete -c aether -f"]
    lines += [f"complete -c aether -l log-level -x -a {_quoted(_words(LOG_LEVELS))} -d 'messages on stderr'"]
    lines += [f"complete -c aether -l log-format -x -a {_quoted(_words(LOG_FORMATS))} -d 'their format'"]
    for command in found:
        if len(command.words) == 1:
            verb = command.words[0]
            lines.append(f"complete -c aether -n __fish_use_subcommand -a {verb} -d {_quoted(command.line)}")
            seen = f"__fish_seen_subcommand_from {verb}"
            names = _words(command.actions)
            for name, line in command.actions.items():
                none = f"{seen}; and not __fish_seen_subcommand_from {names}"
                lines.append(f"complete -c aether -n {_quoted(none)} -a {name} -d {_quoted(line)}")
        else:
            seen = "; and ".join(f"__fish_seen_subcommand_from {word}" for word in command.words)
        lines += [line for option in command.options if (line := _fish_line(option, seen))]
    return "\n".join(lines)


def _fish_line(option: Option, seen: str) -> str:
    names = " ".join(f"-l {flag[2:]}" if flag.startswith("--") else f"-s {flag[1:]}" for flag in option.flags)
    values = f" -a {_quoted(_words(option.values))}" if option.values else ""
    kind = " -r -F" if option.is_path else " -x" if option.takes_value and option.flags else ""
    if not names and not values and not option.is_path:
        return ""
    described = f" -d {_quoted(option.line)}" if option.line else ""
    return f"complete -c aether -n {_quoted(seen)} {names}{kind}{values}{described}".replace("  ", " ")
