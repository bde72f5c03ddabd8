"""Prompt files: what is read, and that every fault is named with its place, value and remedy."""

import io
import os
import random
import subprocess
import sys
import tracemalloc

import pytest

from zquant.errors import FormatError
from zquant.formats import prompt_file as subject
from zquant.formats.prompt_file import PromptLine, read_prompts

ALLOWED = ("width", "height", "steps", "seed", "guidance_scale", "negative_prompt", "count", "name")


@pytest.fixture
def read(write):
    """Reads a prompt file of these bytes or this text."""

    def read(data, allowed=ALLOWED):
        data = data.encode() if isinstance(data, str) else data
        return read_prompts(write("prompts.txt", data), allowed)

    return read


def prompts(lines):
    return [line.fields["prompt"] for line in lines]


def test_plain_text_and_json_may_be_mixed(read):
    text = '# foxes\na red fox\n\n  a blue one\t \n{"prompt": "a dog", "seed": 7, "name": "dog"}\n'
    assert read(text) == [
        PromptLine(number=2, fields={"prompt": "a red fox"}),
        PromptLine(number=4, fields={"prompt": "a blue one"}),
        PromptLine(number=5, fields={"prompt": "a dog", "seed": 7, "name": "dog"}),
    ]


@pytest.mark.parametrize(
    "data",
    [
        "雪中的狐狸\na 🦊\n".encode(),
        "雪中的狐狸\r\n\r\na 🦊\r\n".encode(),
        "\ufeff雪中的狐狸\na 🦊".encode(),
        "雪中的狐狸\n\ufeffa 🦊\n".encode(),  # two files in one
        "  # no prompt\n雪中的狐狸\n#\na 🦊".encode(),
    ],
    ids=["plain", "CRLF", "BOM, no last line end", "BOM inside", "comments"],
)
def test_the_same_prompts_however_they_are_stored(data, read):
    assert prompts(read(data)) == ["雪中的狐狸", "a 🦊"]


def test_only_line_feeds_end_lines(read):
    text = "a\u2028b\x85c\u2029d"
    assert prompts(read(text)) == [text]


def test_a_json_prompt_may_be_any_text(read):
    text = '{"prompt": "# a\\n{b}", "negative_prompt": ""}\n{"prompt": " c", "seed": null}'
    assert [line.fields for line in read(text)] == [
        {"prompt": "# a\n{b}", "negative_prompt": ""},
        {"prompt": " c", "seed": None},
    ]


def test_values_are_left_to_whoever_uses_them(read):
    (line,) = read('{"prompt": "a", "width": 1.5, "steps": "8", "seed": -1, "count": true}')
    assert line.fields == {"prompt": "a", "width": 1.5, "steps": "8", "seed": -1, "count": True}


@pytest.mark.parametrize("data", ["a fox\n", '{"prompt": "a fox"}'])
def test_standard_input(data, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data.encode()), "ascii"))
    assert prompts(read_prompts("-", ())) == ["a fox"]


def test_faults_of_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\n{"), "ascii"))
    with pytest.raises(FormatError, match=r"^standard input, line 2: is not a JSON object"):
        read_prompts("-", ())
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(FormatError, match=r"^standard input: is closed\. Pipe prompts into it"):
        read_prompts("-", ())


def fault(text, message):
    return pytest.param(text, message, id=message.split(r"\.")[0][:50])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        fault('{"prompt": "a", "widht": 5}', r"'widht' is not a setting; did you mean 'width'\? "),
        fault('{"prompt": "a", "qqq": 5}', r"'qqq' is not a setting; Known: count, guidance_scale"),
        fault('{"prompt": "a", "\\ud800": 5}', r"'\\ud800' is not a setting"),
        fault('{"prompt": "a", "seed": 1, "seed": 2}', r"has 'seed' twice; .* Remove one\."),
        fault('{"prompt": "a", "prompt": "a"}', r"has 'prompt' twice"),
        fault('{"seed": 1}', r"has no 'prompt'; expected the text of a prompt\. Write it like"),
        fault('{"prompt": 5}', r"'prompt' is 5; expected the text of a prompt"),
        fault('{"prompt": " \\n"}', r"'prompt' is ' \\n'; expected the text"),
        fault("{}", r"has no 'prompt'"),
        fault(
            "{a|b} fox", r"is not a JSON object \(character 2: .* 'a|b} fox'\)\. A prompt that s"
        ),
        fault('{"prompt": "a"} fox', r"is not a JSON object \(character 17: Extra data 'fox'\)"),
        fault('{"prompt": "a\tb"}', r"is not a JSON object \(character 14: Invalid control char"),
        fault('{"prompt": "a", "seed": [7]}', r"'seed' is a list; expected text or a number"),
        fault('{"prompt": {"prompt": "a"}}', r"'prompt' is an object; expected text or a number"),
        fault('{"prompt": "a", "seed": NaN}', r"has NaN, which is not JSON; .* finite number"),
        fault('{"prompt": "a", "seed": -Infinity}', r"has -Infinity, which is not JSON"),
        fault("a\0b", r"character 2 is '\\x00'; expected text without control .* Save the file as"),
        fault("a\rb", r"character 2 is '\\r'; expected text without control characters"),
        fault('{"prompt": ' + "[" * 60_000, r"is nested too deeply\. Write it like"),
        fault('{"prompt": ' + '{"a":' * 10_000, r"is nested too deeply"),
        fault('{"prompt": "a", "seed": ' + "9" * 60_000 + "}", r"has a number of 60000 digits \(9"),
        fault('{"prompt": "a", "seed": -' + "9" * 50 + "}", r"has a number of 51 digits"),
        fault("a" * (subject.MAX_LINE_BYTES + 1), r"has 65537 bytes; at most 65536 are read\. Wri"),
        fault("#" * (subject.MAX_LINE_BYTES + 1), r"has 65537 bytes; at most 65536 are read"),
    ],
)
def test_a_wrong_line_is_named(line, message, read):
    with pytest.raises(FormatError, match=r"prompts\.txt, line 3: " + message):
        read("# first\na fox\n" + line + "\nanother fox\n")


def test_a_setting_that_is_not_allowed_here(read):
    with pytest.raises(FormatError, match=r"line 1: 'seed' is not a setting; Known: prompt\."):
        read('{"prompt": "a", "seed": 1}', allowed=())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"a\nb\xff", r"line 2: byte 3 of the file \(0xff\) is not UTF-8\. Save the file as UTF-8"),
        (b"a\r\n\r\n{\xc3}", r"line 3: byte 6 of the file \(0xc3\)"),
        (b"a\xed\xa0\x80", r"line 1: byte 1 of the file \(0xed\)"),  # a surrogate
        ("a".encode("utf-16"), r"line 1: byte 0 of the file \(0xff\)"),
        ("a".encode("utf-16-le"), r"line 1: character 2 is '\\x00'"),
        (b"", r"prompts\.txt: has no prompts \(0 bytes\)\. Write one per line"),
        (b"\xef\xbb\xbf# a\n\n \n", r"prompts\.txt: has no prompts \(10 bytes\)"),
    ],
    ids=["text", "json", "surrogate", "UTF-16", "UTF-16 without BOM", "empty", "comments"],
)
def test_a_wrong_file_is_named(data, message, read):
    with pytest.raises(FormatError, match=message):
        read(data)


def test_the_longest_line(read):
    line = "a" * subject.MAX_LINE_BYTES
    assert prompts(read(f"{line}\r\n")) == [line]


def test_the_most_prompts(read):
    most = subject.MAX_PROMPTS
    assert len(read("a\n\n#\n" * most)) == most
    with pytest.raises(FormatError, match=r"line 10001: more than 10,000 prompts\. Split the file"):
        read("a\n" * (most + 1))


def test_a_large_file_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(10 * 2**40)  # takes no space
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match=r"large: is larger than 64\.0 MiB; .* Split it if"):
            read_prompts(path, ())
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_without_end(tmp_path):
    """A pipe has no size, so what was read of it is counted."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with (
        subprocess.Popen(["sh", "-c", 'exec cat /dev/zero 2>&1 > "$0"', str(path)]) as process,
        pytest.raises(FormatError, match=r"pipe: is larger than 64\.0 MiB"),
    ):
        read_prompts(path, ())
    assert process.returncode != 0


def test_no_file(tmp_path):
    with pytest.raises(FormatError, match=r"no\.txt: cannot be read \(No such file .*\)\. Check"):
        read_prompts(tmp_path / "no.txt", ())
    with pytest.raises(FormatError, match=r": is a folder; expected a file with one prompt per"):
        read_prompts(tmp_path, ())


@pytest.mark.parametrize(
    "name",
    ["a", "a fox", "狐狸-1", "v1.2", "a🦊", "console", "com10", "-a", "a" * 200, "nul-1", "é"],
)
def test_names(name, read):
    assert read(f'{{"prompt": "a", "name": "{name}"}}')[0].fields["name"] == name


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ('"a/b"', "has the character '/'"),
        ('"/a"', "has the character '/'"),
        ('"..\\\\a"', r"has the character '\\\\'"),
        ('"C:a"', "has the character ':'"),
        ('"a?"', r"has the character '\?'"),
        ('"a\\u0000"', r"has the character '\\x00'"),
        ('"a\\nb"', r"has the character '\\n'"),
        ('"a\\u0085"', r"has the character '\\x85'"),
        ('"a\\ud800"', r"has the character '\\ud800'"),
        ('""', "is empty"),
        ('"."', "starts or ends with a dot or a space"),
        ('".."', "starts or ends with a dot or a space"),
        ('".zquant-job"', "starts or ends with a dot or a space"),
        ('"a."', "starts or ends with a dot or a space"),
        ('"a "', "starts or ends with a dot or a space"),
        ('"NUL"', "is reserved by Windows"),
        ('"con.fox"', "is reserved by Windows"),
        ('"Lpt9 .a.b"', "is reserved by Windows"),
        ('"com³"', "is reserved by Windows"),
        ('"conout$"', "is reserved by Windows"),
        ('"fox.PNG"', r"ends in \.png already"),
        (f'"{"狐" * 67}"', "has 201 bytes of at most 200"),
        ("5", "is not text"),
        ("null", "is not text"),
    ],
)
def test_names_that_are_no_file_names(name, why, read):
    message = rf"line 2: 'name' is '.*', which {why}; expected a plain file name such as \"fox-1\""
    with pytest.raises(FormatError, match=message):
        read(f'\n{{"prompt": "a", "name": {name}}}')


@pytest.mark.parametrize(
    ("first", "second"),
    [("fox", "fox"), ("fox", "Fox"), ("caf\u00e9", "cafe\u0301"), ("STRASSE", "straße")],
)
def test_names_that_some_file_system_takes_for_the_same(first, second, read):
    text = "".join(f'{{"prompt": "a", "name": "{name}"}}\n' for name in (first, "b", second))
    with pytest.raises(FormatError, match=r"line 3: 'name' is .*, as in line 1; .* Change one"):
        read(text)


def test_damaged_files_are_prompts_or_a_format_error(read):
    """Random edits of a good file never end in another error."""
    good = '# a\n{"prompt": "é", "seed": 7, "name": "fox", "count": 1.5e3}\r\na 🦊 in\n'.encode()
    pieces = [b"{", b"}", b"[", b'"', b"\\u", b"\n", b"\0", b"\xff", b"9" * 50, b"1e999", b"\xef"]
    choose = random.Random(3)
    outcomes = {True: 0, False: 0}
    for _ in range(1500):
        data = bytearray(good)
        for _ in range(choose.randint(1, 3)):
            at = choose.randrange(len(data))
            data[at : at + choose.randint(0, 4)] = choose.choice(pieces)
        try:
            found = read(bytes(data))
        except FormatError:
            outcomes[False] += 1
        else:
            assert all(line.fields["prompt"].strip() for line in found)
            outcomes[True] += 1
    assert min(outcomes.values()) > 100  # both were met
