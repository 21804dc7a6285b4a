"""What is to be drawn: flags, files and standard input → requests, and one line for what is none."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import generate
from args_generate import Request, read_requests

ROOT = Path(__file__).resolve().parent.parent.parent


def test_lines_and_objects(tmp_path):
    path = tmp_path / "prompts.txt"
    lines = ["  a red   circle ", "", json.dumps({"prompt": "a dog", "num_images": 3, "seed": 7, "top_p": 0.5})]
    lines += ['{"text": "a cat", "temperature": 2, "file": "x.jpg", "scores": {}, "top_k": null}']
    path.write_text("\ufeff" + "\r\n".join(lines), encoding="utf-8")
    found = read_requests(file=path)
    assert [one.prompt for one in found] == ["a red circle", "a dog", "a cat"]
    assert (found[1].num_images, found[1].seed, found[1].sampling) == (3, 7, {"top_p": 0.5})
    assert found[2].sampling == {"temperature": 2} and found[2].seed is None
    assert found[2].source.endswith("prompts.txt, line 4")
    assert read_requests(text="a|b  c") == [Request("a"), Request("b c")]


def test_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("a red circle\na dog\n"))
    assert [one.prompt for one in read_requests(file="-")] == ["a red circle", "a dog"]


@pytest.mark.parametrize(
    "contents, told",
    [
        (b"", "no prompts in it"),
        (b"\n \n", "no prompts in it"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"{", "line 1: not a JSON object"),
        (b"red\n{}", "line 2: no prompt"),
        (b'{"prompt": 3}', "prompt is 3, not text"),
        (b'{"prompt": "a", "seed": 1.5}', "seed is 1.5, not a whole number"),
        (b'{"prompt": "a", "seed": -1}', "seed is -1"),
        (b'{"prompt": "a", "seed": true}', "seed is true"),
        (b'{"prompt": "a", "num_images": 0}', "num_images is 0"),
        (b'{"prompt": "a", "top_p": "x"}', 'top_p is "x", not a number'),
        (b'{"prompt": "a", "top_p": NaN}', "top_p is NaN"),
        (b'{"prompt": "a", "sed": 1}', "sed: unknown key; choose from prompt, num_images, seed"),
    ],
)
def test_what_is_no_request(tmp_path, contents, told):
    path = tmp_path / "prompts.txt"
    path.write_bytes(contents)
    with pytest.raises(ValueError, match=told) as error:
        read_requests(file=path)
    assert "prompts.txt" in str(error.value) and "\n" not in str(error.value)


def test_a_file_of_prompts_from_the_command_line(command, tiny_checkpoint, tmp_path):
    (tmp_path / "prompts.jsonl").write_text(
        '{"prompt": "red", "seed": 9, "num_images": 1, "temperature": 0.5}\nblue star\n'
    )
    flags = ["--dalle_path", tiny_checkpoint, "--num_images", 2, "--seed", 4, "--device", "cpu", "--format", "png"]
    ended = command(
        generate.main, *flags, "--prompts_file", tmp_path / "prompts.jsonl", "--outputs_dir", tmp_path / "one"
    )
    assert ended.status == 0, ended
    lines = [json.loads(line) for line in (tmp_path / "one" / "results.jsonl").open(encoding="utf-8")]
    assert [(line["prompt"], line["seed"], line["temperature"]) for line in lines] == [
        *(("red", 9, 0.5), ("blue star", 4, 1.0), ("blue star", 5, 1.0))
    ]
    for line in lines:
        with Image.open(tmp_path / "one" / line["file"]) as image:
            about = json.loads(image.info["Comment"])
        assert about == {key: value for key, value in line.items() if key != "file"}
        assert about["fingerprint"] and about["checkpoint"] == "dalle_0.pt"
    # What came out can be drawn again.
    again = tmp_path / "again"
    flags[3] = 1
    ended = command(generate.main, *flags, "--prompts_file", tmp_path / "one" / "results.jsonl", "--outputs_dir", again)
    assert ended.status == 0, ended
    for line in lines:
        (same,) = (again / Path(line["file"]).parent).glob(f"*-seed-{line['seed']}.png")
        assert Image.open(same).tobytes() == Image.open(tmp_path / "one" / line["file"]).tobytes()


def test_prompts_from_standard_input(tiny_checkpoint, tmp_path):
    words = ["--dalle_path", tiny_checkpoint, "--num_images", "1", "--device", "cpu", "--outputs_dir", tmp_path]
    done = subprocess.run(
        [sys.executable, ROOT / "generate.py", *words], input="red\nblue star\n", capture_output=True, text=True
    )
    assert done.returncode == 0 and {path.name for path in tmp_path.iterdir() if path.is_dir()} == {
        "red",
        "blue_star",
    }, done.stderr


def test_from_pictures_ranked_and_animated(command, tiny_checkpoint, drawn_pictures, tmp_path):
    flags = ["--dalle_path", tiny_checkpoint, "--device", "cpu", "--seed", 1, "--num_images", 2, "--format", "png"]
    picture = sorted(drawn_pictures.glob("*.png"))[0]
    more = ["--image_prompt", picture, "--keep_rows", 3, "--rank", 3, "--animate", "--preview", 1]
    ended = command(generate.main, *flags, *more, "--text", "a red circle", "--outputs_dir", tmp_path / "a")
    assert ended.status == 0, ended
    lines = [json.loads(line) for line in (tmp_path / "a" / "results.jsonl").open()]
    assert len(lines) == 2 and lines[0]["scores"]["likelihood"] >= lines[1]["scores"]["likelihood"]
    assert all(line["kept_rows"] == 3 and 1 <= line["seed"] <= 6 for line in lines)
    with Image.open(tmp_path / "a" / "a_red_circle" / "forming.webp") as moving:
        assert moving.n_frames == 4
    assert not (tmp_path / "a" / "preview.png").exists()
    first = tmp_path / "a" / lines[0]["file"]
    ended = command(generate.main, *flags, "--variations", first, "--outputs_dir", tmp_path / "b")
    assert ended.status == 0 and (tmp_path / "b" / "a_red_circle" / "1-seed-2.png").exists(), ended
    ended = command(generate.main, *flags, "--variations", picture, "--outputs_dir", tmp_path / "c")
    assert ended.status == 2 and "--text" in ended.err and not (tmp_path / "c").exists()


def test_the_library_call(tiny_checkpoint):
    loaded = generate.load(tiny_checkpoint, device="cpu")
    images = generate.generate(loaded, ["a red circle", "blue"], num_images=2, seed=5, temperature=0.9)
    assert [image.info["seed"] for image in images] == [5, 6, 5, 6]
    assert [image.info["prompt"] for image in images] == ["a red circle"] * 2 + ["blue"] * 2
    (same,) = generate.generate(loaded, "a red circle", seed=6, temperature=0.9)
    assert same.tobytes() == images[1].tobytes() and same.size == (32, 32)
    (best,) = generate.generate(loaded, "a red circle", seed=5, rank=2, image_prompt=same, keep_rows=1)
    assert best.info["scores"].keys() == {"likelihood"} and best.info["kept_rows"] == 1
