"""The mechanics of a command line on a small parser: spellings, switches, ranges, and a configuration beneath flags."""

import pytest

from utils import command_line
from utils.command_line import Parser, list_of, number


def small_parser():
    parser = Parser("Grows things.")
    parser.add_argument("--config")
    add = parser.heading("Garden")
    add("plant-name", "rose", "what grows", str)
    add("row-count", 3, "rows", number(int, low=1))
    add("water", None, "litres", number(float, above=0, below=10))
    add("is-wild", True, "let it grow", bool)
    add("bed-sizes", [2.5], "metres", list_of(number(float, low=0)), nargs="+")
    add("soil", "loam", "ground", choices=("loam", "sand"))
    return parser


@pytest.fixture
def configs(tmp_path, monkeypatch):
    """Writes the configuration file that --config reads."""
    path = tmp_path / "configs.yaml"
    monkeypatch.setattr(command_line, "CONFIGS", path)
    return path.write_bytes


def values(*argv):
    return vars(small_parser().parse(argv))


def test_an_entry_lies_between_defaults_and_flags(configs):
    configs(b"plot: {row_count: 7, is_wild: false, bed_sizes: [1, 2.5], plant_name: 'on', soil: sand, water: null}")
    expected = {"config": "plot", "plant_name": "on", "row_count": 7, "water": None, "is_wild": False, "soil": "sand"}
    assert values("--config", "plot") == {**expected, "bed_sizes": [1, 2.5]}
    over = values("--row-count", "8", "--config=plot", "--is-wild", "--bed-sizes", "4")
    assert (over["row_count"], over["is_wild"], over["bed_sizes"]) == (8, True, [4])
    assert (over["plant_name"], over["soil"]) == ("on", "sand")
    configs(b"base: &base {row_count: 7, water: 1e-1}\nplot:\n  <<: *base\n  bed_sizes: 3\n  row_count: 8\n")
    plot = values("--config", "plot")  # entries may build on each other and hold lone numbers
    assert (plot["row_count"], plot["water"], plot["bed_sizes"]) == (8, 0.1, [3])


def test_a_bad_entry_is_one_line_that_names_file_entry_and_key(configs, command):
    for entry, told in (
        ("row_count: 0", ["--row-count", "'0'"]),
        ("row_count: {rows: 3}", ["row_count", "rows"]),
        ("bed_sizes: [1, [2, 3]]", ["bed_sizes", "[2, 3]"]),
        ("plant_name: yes", ["plant_name", "True"]),
        ("soil: clay", ["--soil", "'clay'"]),
        ("colour: red", ["colour", "no such setting"]),
        ("3: 4", ["3", "no such setting"]),
    ):
        configs(f"fine: {{row_count: 3}}\nplot:\n  {entry}\n".encode())
        assert values("--config", "fine")["row_count"] == 3
        error = command(small_parser().parse, "--config", "plot").refused().err
        assert "error: configs.yaml, plot: " in error and all(word in error for word in told), error


def test_a_configuration_file_that_cannot_serve_is_one_line(configs, command):
    for content, told in (
        (None, ["No such file"]),
        (b"plot: {row_count: 3}\n7: {}", ["--config", "'lawn'", "it has plot, 7"]),
        (b"lawn: [3]", ["named configurations"]),
        (b"lawn: {row_count: 3", ["is not YAML"]),
        (b"lawn: {plant_name: !!python/object/apply:os.getcwd []}", ["is not YAML"]),
    ):
        if content is not None:
            configs(content)
        error = command(small_parser().parse, "--config", "lawn").refused().err
        assert "configs.yaml" in error and all(word in error for word in told), error
