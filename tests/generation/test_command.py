"""Prompts from flags, files and standard input, what generate.py makes of them, and the library call."""

import io
import json
import sys
from pathlib import Path

from PIL import Image

import generate
from generate import Request, read_requests
from tests.builders import one_line, python


def results(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").open(encoding="utf-8")]


def test_lines_and_objects(tmp_path, monkeypatch):
    path = tmp_path / "prompts.txt"
    lines = ["  a red   circle ", "", json.dumps({"prompt": "a dog", "num_images": 3, "seed": 7, "top_p": 0.5})]
    lines += ['{"text": "a cat", "temperature": 2, "file": "x.jpg", "scores": {}, "top_k": null}']
    path.write_text("\ufeff" + "\r\n".join(lines), encoding="utf-8")
    source = f"{path}, line "
    assert read_requests(file=path) == [
        Request("a red circle", source=source + "1"),
        Request("a dog", 3, 7, sampling={"top_p": 0.5}, source=source + "3"),
        Request("a cat", 1, sampling={"temperature": 2}, source=source + "4"),  # one image: a line of results.jsonl
    ]
    assert read_requests(text="a|b  c") == [Request("a"), Request("b c")]
    monkeypatch.setattr(sys, "stdin", io.StringIO("a red circle\na dog\n"))
    assert [request.prompt for request in read_requests(file="-")] == ["a red circle", "a dog"]
    for encoding in ("utf-8-sig", "utf-16"):  # as editors and PowerShell write text
        content = "a dog\u2028and a cat\na bus\n".encode(encoding)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))
        assert [request.prompt for request in read_requests(file="-")] == ["a dog and a cat", "a bus"]


def test_wrong_prompt_files_are_refused_in_one_line(tmp_path):
    for contents, message in (
        (b"", "no prompts in it"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"{", "line 1: not a JSON object"),
        (b"red\n{}", "line 2: no prompt"),
        (b'{"prompt": 3}', "prompt is 3, not text"),
        (b'{"prompt": "a", "seed": -1}', "seed is -1"),
        (b'{"prompt": "a", "top_p": "x"}', 'top_p is "x", not a number'),
        (b'{"prompt": "a", "top_k": 1' + 400 * b"0" + b"}", "top_k is 10+, not a number$"),
        (b'{"prompt": "a", "sed": 1}', "sed: unknown key; choose from prompt, num_images, seed"),
    ):
        (tmp_path / "prompts.txt").write_bytes(contents)
        with one_line(f"prompts.txt.*{message}"):
            read_requests(file=tmp_path / "prompts.txt")


def test_results_can_be_generated_again(command, tiny_checkpoint, tmp_path):
    prompts, first, again = tmp_path / "prompts.jsonl", tmp_path / "first", tmp_path / "again"
    prompts.write_text('{"prompt": "red", "seed": 9, "num_images": 1, "temperature": 0.5}\nblue star\n')
    flags = ["--dalle_path", tiny_checkpoint, "--seed", 4, "--device", "cpu", "--format", "png"]
    command(generate.main, *flags, "--num_images", 2, "--prompts_file", prompts, "--outputs_dir", first).ok()
    lines = results(first)
    settings = [(line["prompt"], line["seed"], line["temperature"]) for line in lines]
    assert settings == [("red", 9, 0.5), ("blue star", 4, 1.0), ("blue star", 5, 1.0)]
    for line in lines:
        with Image.open(first / line["file"]) as image:
            metadata = json.loads(image.info["Comment"])
        assert metadata == {key: value for key, value in line.items() if key != "file"}
        assert metadata["fingerprint"] and metadata["checkpoint"] == "dalle_0.pt"
    command(generate.main, *flags, "--prompts_file", first / "results.jsonl", "--outputs_dir", again).ok()
    assert len(results(again)) == len(lines)
    for line in lines:
        (same,) = (again / Path(line["file"]).parent).glob(f"*-seed-{line['seed']}.png")
        assert Image.open(same).tobytes() == Image.open(first / line["file"]).tobytes()
    path = first / lines[0]["file"]
    run = [*flags, "--image_prompt", path, "--keep_rows", 2, "--text", "red", "--num_images", 1]
    command(generate.main, *run, "--outputs_dir", tmp_path / "kept").ok()
    run = [*flags, "--prompts_file", tmp_path / "kept" / "results.jsonl", "--outputs_dir", again]
    command(generate.main, *run).refused("line 1: keeps rows of an image; name it as image_prompt")
    command(generate.main, *run, "--image_prompt", path).ok()
    kept = [Image.open(folder / results(folder)[-1]["file"]).tobytes() for folder in (tmp_path / "kept", again)]
    assert kept[0] == kept[1]


def test_prompts_from_standard_input(tiny_checkpoint, tmp_path):
    flags = ["--dalle_path", tiny_checkpoint, "--num_images", 1, "--device", "cpu", "--outputs_dir", tmp_path]
    done = python("generate.py", *flags, input="red\nblue star\n")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"red", "blue_star"}


def test_image_prompts_ranking_animations_and_variations(command, tiny_checkpoint, drawn_pictures, tmp_path):
    flags = ["--dalle_path", tiny_checkpoint, "--device", "cpu", "--seed", 1, "--num_images", 2, "--format", "png"]
    image = sorted(drawn_pictures.glob("*.png"))[0]
    more = ["--image_prompt", image, "--keep_rows", 3, "--rank", 3, "--animate", "--preview", 1]
    command(generate.main, *flags, *more, "--text", "a red circle", "--outputs_dir", tmp_path / "a").ok()
    lines = results(tmp_path / "a")
    assert len(lines) == 2 and lines[0]["scores"]["likelihood"] >= lines[1]["scores"]["likelihood"]
    assert all(line["kept_rows"] == 3 and 1 <= line["seed"] <= 6 for line in lines)
    assert lines[0]["seed"] != lines[1]["seed"]
    with Image.open(tmp_path / "a" / "a_red_circle" / "forming.webp") as animation:
        assert animation.n_frames == 4
    assert not (tmp_path / "a" / "preview.png").exists()
    first = tmp_path / "a" / lines[0]["file"]
    command(generate.main, *flags, "--variations", first, "--outputs_dir", tmp_path / "b").ok()
    assert (tmp_path / "b" / "a_red_circle" / "1-seed-2.png").exists()
    for path, problem in ((image, "--text"), (tmp_path / "no.png", "no.png: no such file")):
        command(generate.main, *flags, "--variations", path, "--outputs_dir", tmp_path / "c").refused(problem)
        assert not (tmp_path / "c").exists()


def test_the_library_call(tiny_checkpoint):
    loaded = generate.load(tiny_checkpoint, device="cpu")
    images = generate.generate(loaded, ["a red circle", "blue"], num_images=2, seed=5, temperature=0.9)
    assert [image.info["seed"] for image in images] == [5, 6, 5, 6]
    assert [image.info["prompt"] for image in images] == ["a red circle"] * 2 + ["blue"] * 2
    seen = []
    (same,) = generate.generate(loaded, "a red circle", seed=6, temperature=0.9, watch=lambda codes: seen.append(codes))
    assert same.tobytes() == images[1].tobytes() and same.size == (32, 32) and len(seen) == 16
    (best,) = generate.generate(loaded, "a red circle", seed=5, rank=2, image_prompt=same, keep_rows=1)
    assert best.info["scores"].keys() == {"likelihood"} and best.info["kept_rows"] == 1
