"""What is known of a file is kept until the file changes."""

import os
from functools import partial
from pathlib import Path

from scail2_rt.runtime.media.kept_results import KeptResults


def test_kept_until_the_file_changes(tmp_path: Path) -> None:
    kept, made = KeptResults[int](count=2), list[str]()

    def asked(path: Path, about: str = "") -> int:
        return kept.get(path, about, lambda: made.append(f"{path.name}{about}") or len(made))

    file = tmp_path / "a"
    file.write_bytes(b"1")
    assert (asked(file), asked(file)) == (1, 1)
    assert asked(file, " from 5") == 2
    file.write_bytes(b"22")
    assert asked(file) == 3
    os.utime(file, (0, 0))
    assert asked(file) == 4
    assert made == ["a", "a from 5", "a", "a"]


def test_only_the_last_ones_are_kept(tmp_path: Path) -> None:
    kept, made = KeptResults[str](count=2), list[str]()
    for name in "abc":
        (tmp_path / name).touch()
    for name in "abacab":
        kept.get(tmp_path / name, None, partial(lambda name: made.append(name) or name, name))
    assert made == ["a", "b", "c", "b"]


def test_what_is_no_file_or_changes_meanwhile_is_not_kept(tmp_path: Path) -> None:
    kept, made = KeptResults[int](count=2), list[object]()
    file = tmp_path / "a"
    file.write_bytes(b"1")

    def grows() -> int:
        file.write_bytes(b"1" * (len(made) + 2))
        made.append(file)
        return len(made)

    assert [kept.get(file, None, grows) for _ in range(2)] == [1, 2]
    for source in (tmp_path, tmp_path / "none", object()):
        first, second = (kept.get(source, None, lambda: made.append(1) or len(made)) for _ in range(2))
        assert second == first + 1
