"""`--config FILE.toml` through the installed command."""

from pathlib import Path

import pytest

from tests.support.command import Run, error_of, one_json

pytest_plugins = ["tests.support.runtime_fixtures"]

SMALL = 'size = "64x96"\nsteps = 2\nsegment-length = 13\nguidance = 1\n'


def test_a_video_from_a_file(scail2: Run, engines: Path, case: Path, tmp_path: Path) -> None:
    """Paths are relative to the file's folder. The table overrides the top of the file, the command line overrides
    both."""
    (tmp_path / "case").symlink_to(case)
    (tmp_path / "elsewhere").mkdir()
    config = tmp_path / "my.toml"
    table = '[generate]\ncase = "case"\noutput = "out/a.mp4"\nseed = 2\nsegment_overlap = 9\nno-graphs = true\n'
    config.write_text(f'engines = "{engines}"\nseed = 1\n{SMALL}{table}')
    report = one_json(scail2("generate", "--config", config, "--seed", "3", "--json", cwd=tmp_path / "elsewhere"))
    assert (tmp_path / "out" / "a.mp4").is_file()
    options = report["options"]
    assert (options["seed"], options["segment_overlap"], options["size"]) == (3, 9, [64, 96])
    assert options["config"] == str(config)
    dry = scail2("generate", "--dry-run", "-o", tmp_path / "b.mp4", "--json", SCAIL2_RT_CONFIG=str(config))
    assert one_json(dry)["frames"] == 21


def test_a_build_from_a_file(scail2: Run, tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoint").symlink_to(tiny_checkpoint)
    config = tmp_path / "my.toml"
    config.write_text(
        '[build-engines]\ncheckpoint = "checkpoint"\noutput = "e"\nbackend = ["torch"]\nprecision="bf16"\n'
    )
    built = one_json(scail2("build-engines", "--config", config, "--json"))
    assert (built["directory"], built["backends"], built["precision"]) == (str(tmp_path / "e"), ["torch"], "bf16")


def test_a_server_on_the_command_line_wins_over_the_engines_of_a_file(scail2: Run, tmp_path: Path) -> None:
    (tmp_path / "my.toml").write_text('engines = "e"\n')
    words = ("generate", "--config", tmp_path / "my.toml", "--server", "http://127.0.0.1:9", "-o", "a.mp4")
    assert "both given" not in scail2(*words, "--case", tmp_path).stderr


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("stepss = 2", "stepss is not an option. Use steps"),
        ("[generat]\nsteps = 2", "generat is not a table of a command. Use generate"),
        ("[build-engines]\nengines = 'e'", "engines is not an option of `build-engines`"),
        ("[generate]\nlora = 'l'", "lora is not an option of `generate`"),
        ("steps = 'many'", "steps: 'many' is not a valid integer"),
        ("steps = true", "steps is true. Give a text or a number"),
        ("seed_s = 1\nseed-s = 2", "gives seed-s twice, also as seed_s"),
        ("[generate]\nvram_limit = '9GiB'\nvram-limit = '8GiB'", "gives vram-limit twice"),
        ("[generate]\npoint = [['5,5']]", "point is [['5,5']]. Give a list of texts or numbers"),
        ("[generate]\njson = true", "json is not an option of `generate`. See --help"),
        ("overwrite = 'yes'", "overwrite is 'yes'. Give true or false"),
        ("size = [64, 96]", "size is [64, 96]. Give a text or a number"),
        ("seeds = [1, 1]", "seeds: '1,1' is not a list of different seeds"),
        ("codec = 'h265'", "codec: 'h265' is not one of"),
        ("generate = 3", "generate must be a table"),
        ("[masks]\nimage = 'a.png'", "[masks.make]"),
        ("steps =", "is not a valid TOML file"),
    ],
)
def test_a_file_that_cannot_be_used(scail2: Run, tmp_path: Path, text: str, says: str) -> None:
    config = tmp_path / "my.toml"
    config.write_text(text)
    message = error_of(scail2("generate", "--config", config))
    assert str(config) in message
    assert says in message


def test_an_error_says_that_a_file_was_read(scail2: Run, tmp_path: Path) -> None:
    """Options of the file and of the command line that exclude each other."""
    config = tmp_path / "my.toml"
    config.write_text("seed = 1\ncase = 'c'\n[generate]\noutput = 'a.mp4'\n")
    files = ("--image", tmp_path / "a.png", "--driving", tmp_path / "a.mp4")
    message = error_of(scail2("generate", tmp_path, *files, "--config", config))
    assert message.startswith("--case and --image, --driving were both given")
    assert message.endswith(f" (Options were also read from {config}.)")


def test_a_file_that_is_not_there(scail2: Run, tmp_path: Path) -> None:
    message = error_of(scail2("serve", "e", SCAIL2_RT_CONFIG=str(tmp_path / "no.toml")))
    assert "no.toml, which SCAIL2_RT_CONFIG names, cannot be read" in message
    assert "no.toml cannot be read" in error_of(scail2("serve", "e", "--config", tmp_path / "no.toml"))


@pytest.mark.parametrize("words", [("serve",), ("masks", "make"), ("bench", "all")])
def test_other_commands_take_it(scail2: Run, tmp_path: Path, words: tuple[str, ...]) -> None:
    (tmp_path / "my.toml").write_text(f"[{'.'.join(words).removesuffix('.all')}]\nunheard-of = 1\n")
    option = "--config-file" if words[0] == "bench" else "--config"
    assert "unheard-of is not an option of" in error_of(scail2(*words, option, tmp_path / "my.toml"))
