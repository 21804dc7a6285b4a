"""A picture is the same in any company: batches of mixed prompts and settings against one picture at a time."""

import pytest
import torch

from generation import batching, ranking
from generation.image_prompts import count_kept_rows, encode_kept_rows, read_prompt
from generation.loading import load
from generation.output import encode_image, image_metadata, to_image

PROMPTS = ["a red circle", "a small blue star above a large green heart", "two", "little pink square"]


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint):
    return load(tiny_checkpoint, device="cpu")


def wanted(loaded):
    """Eleven pictures that do not all go together."""
    sampling = [{}, {"temperature": 0.5, "top_k": 5}, {"cond_scale": 2.0}]
    given = [None, torch.tensor([3, 1, 4, 1])]
    return [
        batching.plan_image(loaded, PROMPTS[place % 4], 100 + place, sampling[place % 3], given[place % 5 == 0])
        for place in range(11)
    ]


@pytest.mark.parametrize("size", [3, 8, 32])
def test_the_same_pictures_for_any_batch_size_and_company(tiny_checkpoint, loaded, size):
    alone = [
        batching.generate_batch(load(tiny_checkpoint, device="cpu", batch_size=1), [one])[0] for one in wanted(loaded)
    ]
    other = load(tiny_checkpoint, device="cpu", batch_size=size)
    lists = [wanted(loaded)[:4], wanted(loaded)[4:5], wanted(loaded)[5:]]
    codes = list(batching.generate_lists(other, lists))
    assert [len(part) for part in codes] == [4, 1, 6]
    assert torch.equal(torch.cat(codes), torch.stack(alone))
    assert len({tuple(row.tolist()) for row in alone}) == 11


def test_batches_hold_what_goes_together(loaded):
    pictures = wanted(loaded)
    parts = batching.group_into_batches(pictures, 3)
    assert sorted(place for part in parts for place in part) == list(range(11))
    for part in parts:
        assert len(part) <= 3 and len({batching.batch_key(pictures[place]) for place in part}) == 1
    alike = [pictures[1]._replace(seed=seed) for seed in range(7)]
    assert batching.group_into_batches(alike, 3) == [[0, 1, 2], [3, 4, 5], [6]]


def test_a_watch_sees_every_code_and_can_end_the_drawing(loaded):
    pictures, seen = wanted(loaded)[1:2], []
    codes = batching.generate_batch(loaded, pictures, lambda codes: seen.append(codes.clone()))
    assert [part.shape[1] for part in seen] == list(range(1, 17))
    assert all(torch.equal(part, codes[:, : part.shape[1]]) for part in seen)

    def give_up(codes):
        if codes.shape[1] == 5:
            raise InterruptedError("nobody waits")

    with pytest.raises(InterruptedError, match="nobody waits"):
        batching.generate_batch(loaded, pictures, give_up)
    assert torch.equal(batching.generate_batch(loaded, pictures), codes)


@pytest.mark.parametrize(
    "prompt, sampling, told",
    [
        ("", {}, "no words"),
        ("日本", {}, "no words"),
        ("red " * 17, {}, "17 tokens long; the model reads at most 16"),
        ("red", {"temperature": 0}, "temperature is 0"),
        ("red", {"top_k": 1.5}, "top_k is 1.5"),
        ("red", {"top_p": 0}, "top_p is 0"),
        ("red", {"colour": 1}, "colour: unknown setting"),
    ],
)
def test_what_cannot_be_drawn_is_said_in_a_sentence(loaded, prompt, sampling, told):
    with pytest.raises(ValueError, match=told) as error:
        batching.plan_image(loaded, prompt, 0, sampling)
    assert "\n" not in str(error.value)


def test_guidance_needs_a_model_that_has_seen_no_captions(tiny_checkpoint, tmp_path):
    saved = torch.load(tiny_checkpoint, weights_only=True)
    saved["settings"]["caption_dropout"] = 0.0
    saved["sampling"]["cond_scale"] = 1.5  # which the run could not have meant
    torch.save(saved, tmp_path / "told.pt")
    with pytest.raises(ValueError, match="cond_scale is 2, but .*told.pt was trained without --caption-dropout"):
        batching.plan_image(load(tmp_path / "told.pt", device="cpu"), "red", 0, {"cond_scale": 2})
    assert batching.plan_image(load(tmp_path / "told.pt", device="cpu"), "red", 0).sampling.cond_scale == 1
    batching.plan_image(load(tiny_checkpoint, device="cpu"), "red", 0, {"cond_scale": 2})


def test_capital_letters_are_read_where_the_vocabulary_has_small_ones(loaded):
    assert loaded.tokenizer.unknown in loaded.tokenizer.encode("ÄB")  # which no small letters help
    with pytest.raises(ValueError, match="no words"):
        batching.encode_prompt(loaded, "Ä")


def test_an_image_prompt_keeps_its_rows(loaded, drawn_pictures):
    path = sorted(drawn_pictures.glob("*.png"))[3]
    pixels = to_image(loaded.decode(given_whole(loaded, path)[None])[0])
    for picture in (path, pixels):
        given = encode_kept_rows(loaded, picture, 0.5)
        codes = batching.generate_batch(
            loaded, [batching.plan_image(loaded, "red", seed, {}, given) for seed in range(5)]
        )
        assert len(given) == 8 and all(torch.equal(row[:8], given) for row in codes)
        assert len({tuple(row.tolist()) for row in codes}) == 5
    assert torch.equal(encode_kept_rows(loaded, path, 3)[:8], encode_kept_rows(loaded, path, 0.3))


def given_whole(loaded, path):
    return torch.cat([encode_kept_rows(loaded, path, 3), torch.zeros(4, dtype=torch.long)])


@pytest.mark.parametrize("keep, rows", [(1, 1), (3, 3), (0.1, 1), (0.5, 2), (0.74, 3), (4, None), (0.9, None)])
def test_rows_kept(loaded, keep, rows):
    if rows is None:
        with pytest.raises(ValueError, match="keep_rows is"):
            count_kept_rows(loaded, keep)
    else:
        assert count_kept_rows(loaded, keep) == rows


@pytest.mark.parametrize("format", ["png", "jpg"])
def test_a_file_tells_its_prompt(loaded, tmp_path, format):
    one = wanted(loaded)[0]._replace(prompt="a réd circle")
    path = tmp_path / f"it.{format}"
    image = to_image(torch.full((3, 32, 32), 0.5))
    path.write_bytes(encode_image(image, image_metadata(one, loaded), format))
    assert read_prompt(path) == "a réd circle"
    image.save(tmp_path / "other.png")
    assert read_prompt(tmp_path / "other.png") is None and read_prompt(tmp_path / "missing.png") is None


def test_likelihoods_are_those_of_the_models_own_logits(loaded):
    text = torch.stack([one.tokens for one in wanted(loaded)[:3]])
    codes = torch.randint(64, (3, 16), generator=torch.Generator().manual_seed(0))
    model = loaded.model
    with torch.no_grad():
        logits = model(text, codes)[:, model.text_seq_len :]  # the whole vocabulary, masked
        chances = logits.log_softmax(-1).gather(-1, (codes + model.num_text_tokens)[..., None]).sum((1, 2))
        assert torch.allclose(ranking.log_likelihood(model, text, codes), chances, atol=1e-3)
        without = ranking.log_likelihood(model, torch.zeros_like(text), codes)
        assert torch.allclose(ranking.caption_score(model, text, codes, 0.5), chances - 0.5 * without, atol=1e-3)
        assert torch.allclose(ranking.caption_score(model, text, codes, 0), chances, atol=1e-3)


def test_the_best_are_kept_in_their_order(loaded):
    pictures = [batching.plan_image(loaded, "a red circle", seed) for seed in range(6)]
    codes = batching.generate_batch(loaded, pictures)
    text = torch.stack([one.tokens for one in pictures])
    scores = ranking.caption_score(loaded.model, text, codes)
    kept = ranking.best_of(loaded, pictures, codes, 2)
    assert [place for place, _ in kept] == scores.argsort(descending=True)[:2].tolist()
    assert [figures["likelihood"] for _, figures in kept] == pytest.approx(
        scores.sort().values.flip(0)[:2].tolist(), abs=1e-3
    )
    assert ranking.best_of(loaded, pictures, codes, 6) == [(place, None) for place in range(6)]

    def green(images, prompts):  # a judge of its own taste
        assert set(prompts) == {"a red circle"}
        return torch.tensor([sum(image.getpixel((x, x))[1] for x in range(32)) for image in images]).float()

    kept = ranking.best_of(loaded, pictures, codes, 3, green)
    liked = green([to_image(pixels) for pixels in loaded.decode(codes)], ["a red circle"] * 6)
    assert [place for place, _ in kept] == liked.argsort(descending=True, stable=True)[:3].tolist()
    assert kept[0][1].keys() == {"likelihood", "clip"}
