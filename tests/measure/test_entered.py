"""The lines that a command enters, against a small project counted by hand."""

import sys

import pytest

from measure import entered

SCRIPT = '''
"""A script."""
import sys
import threading

from rooms import room


def main():
    """Its

    docstring."""
    # a comment
    room.used(sys.argv[1])

    thread = threading.Thread(target=lambda: room.aside())
    thread.start()
    thread.join()


def never():
    return 0


if __name__ == "__main__":
    main()
    sys.exit(0)
'''
ROOM = '''
import functools


@functools.cache
def used(word):
    text = """a string
    of two lines"""
    return [part(word) for _ in text]


def part(word):
    def inner():
        return word

    return (
        word)


def aside():
    pass


class Never:
    field: int = 1

    def called(self):
        pass
'''


@pytest.fixture
def project(tmp_path):
    for folder, name, text in ((".", "script.py", SCRIPT), ("rooms", "room.py", ROOM),
                               (".venv", "hidden.py", "def hidden(): pass")):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / name).write_text(text)
    yield tmp_path
    for name in ("rooms", "rooms.room"):
        sys.modules.pop(name, None)


def test_lines_by_hand(project, capsys):
    path, argv = sys.path[:], sys.argv[:]
    counts = entered.main([str(project / "script.py"), "word", "--unknown", "1"])
    assert counts == {"rooms/room.py": (5 + 6 + 2, 5 + 5 + 2), "script.py": (10, 5)}
    assert "| sum of 2 files | 23 | 17 |" in capsys.readouterr().out
    assert (path, argv) == (sys.path, sys.argv) and sys.gettrace() is None


def test_a_script_that_fails_or_is_not_there_is_an_error(project):
    (project / "script.py").write_text("import sys\nsys.exit(3)\n")
    with pytest.raises(SystemExit):
        entered.main([str(project / "script.py")])
    assert sys.gettrace() is None
    with pytest.raises(FileNotFoundError, match="expected a Python file"):
        entered.main([str(project / "none.py")])
