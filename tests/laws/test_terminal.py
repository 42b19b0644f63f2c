"""What a file says is shown, and steers nothing: no escape sequence of a file reaches the terminal."""

import ast
import io
import json
import traceback
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sfumato
from sfumato.commands import console, exits
from sfumato.errors import Failed, Refused, for_terminal, json_for_terminal, printable
from sfumato.training.loop.loop import print_to_stderr

SOURCE = Path(sfumato.__file__).parent
SPEAKERS = {
    "cli.py",
    "hub.py",
    "commands/console.py",
    "commands/exits.py",
    "commands/library_messages.py",
    "training/loop/loop.py",
}
"""The files that may print; each passes what it says through `for_terminal`."""
STEERING = {
    "a title": "\x1b]0;PWNED\x07",
    "colors": "\x1b[31mred",
    "the screen cleared": "\x1b[2J\x1b[H",
    "CSI in one letter": "\x9b31m",
    "a line overwritten": "good\rbad",
    "letters taken back": "rm -rf\b\b\b\b\b\bls",
    "a bell": "\x07",
    "a null": "a\0b",
    "text turned around": "\u202egnp.exe",
    "an isolate": "\u2066a\u2069",
    "a line broken elsewhere": "a\u2028b",
    "a tag": "a\U000e0041",
    "bytes that are no text": "caf\udce9",
    "delete": "a\x7f",
}
HARMLESS = [
    "ünïcode 🦊",
    "家\u3000族",
    "👩\u200d🚀",
    "a\tb",
    "two\nlines",
    "\u00a0",
    "می\u200cخواهم",
    "σ → ε",
]


def steers(text: str) -> bool:
    """Whether a text has a control or a mark of direction, said once more and differently."""
    marks = {*range(32), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x2028, 0x2029}
    marks |= {0x200E, 0x200F, 0x061C, *range(0xE0020, 0xE0080), *range(0xD800, 0xE000)}
    return any(ord(one) in marks - {9, 10} for one in text)


@pytest.mark.parametrize("name", STEERING)
def test_nothing_steers_the_terminal(name, capsys):
    """Law: messages, results, refusals and errors of Python show what would steer as its number."""
    text = STEERING[name]
    assert steers(text)
    console.say(text)
    console.result({text: [text]}, text, as_json=False)
    console.result({text: [text]}, text, as_json=True)
    print_to_stderr(text)
    with pytest.raises(SystemExit):
        exits.stop(text, 2)
    with pytest.raises(SystemExit):
        exits.stop(*exits.refusal_of(Refused(text)))
    said = capsys.readouterr()
    for kind in (Refused, Failed):
        try:
            raise kind(f"{text} cannot be")
        except kind:
            traceback.print_exc(file=(shown := io.StringIO()))
        line = shown.getvalue().splitlines()[-1]
        assert not steers(line) and "cannot be" in line
    assert not steers(said.out) and not steers(said.err), (said.out, said.err)
    assert not steers(printable(text))


@pytest.mark.parametrize("text", HARMLESS)
def test_what_is_only_text_is_shown_as_it_is(text):
    assert for_terminal(text) == text and str(Refused(text)) == text


@settings(derandomize=True, max_examples=60, deadline=None)
@given(
    st.recursive(st.text() | st.integers() | st.none(), lambda x: st.lists(x) | st.dictionaries(st.text(), x))
)
def test_json_for_the_terminal_reads_as_what_it_was(value):
    """Law: escaping changes no value, and a result is one line."""
    said = json_for_terminal(value)
    assert not steers(said) and len(said.splitlines()) <= 1
    assert json.loads(said) == json.loads(json.dumps(value))


def test_all_that_is_printed_is_escaped():
    """Law: only the files that escape what they say print, and every print of theirs does."""
    found = set()
    for file in SOURCE.rglob("*.py"):
        place = file.relative_to(SOURCE).as_posix()
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            assert called not in ("typer.echo", "click.echo", "sys.stdout.write", "sys.stderr.write"), place
            if called == "print":
                assert "for_terminal(" in ast.unparse(node), f"{place}, line {node.lineno}"
                found.add(place)
    assert found == SPEAKERS
