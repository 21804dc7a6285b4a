"""An image is the same in any batch; image prompts, ranking, previews and metadata; hostile checkpoints are refused."""

import resource

import numpy as np
import pytest
import torch

from generation import previews, ranking
from generation.image_prompts import encode_kept_rows
from generation.images import generate_batch, generate_lists, plan_image, to_image
from generation.loading import load
from tests.builders import one_line, python
from utils import checkpoint

PROMPTS = ["a red circle", "a small blue star above a large green heart", "two", "little pink square"]


loaded = pytest.fixture(lambda tiny_checkpoint: load(tiny_checkpoint, device="cpu"), scope="module")


def mixed_specs(loaded):
    """Eleven images that cannot all share a batch."""
    sampling = [{}, {"temperature": 0.5, "top_k": 5}, {"cond_scale": 2.0}]
    given = [None, torch.tensor([3, 1, 4, 1])]
    return [
        plan_image(loaded, PROMPTS[place % 4], 100 + place, sampling[place % 3], given[place % 5 == 0])
        for place in range(11)
    ]


def circles(loaded, count, given_codes=None):
    return [plan_image(loaded, "a red circle", seed, None, given_codes) for seed in range(count)]


@pytest.mark.parametrize("size", [3, 32])
def test_an_image_is_the_same_in_any_batch(tiny_checkpoint, loaded, size):
    single = load(tiny_checkpoint, device="cpu", batch_size=1)
    alone = [generate_batch(single, [spec])[0] for spec in mixed_specs(loaded)]
    lists, counts = [mixed_specs(loaded)[:4], mixed_specs(loaded)[4:5], mixed_specs(loaded)[5:]], []
    codes = list(generate_lists(load(tiny_checkpoint, device="cpu", batch_size=size), lists, on_batch=counts.append))
    assert [len(part) for part in codes] == [4, 1, 6] and sum(counts) == 11 and max(counts) <= size
    assert torch.equal(torch.cat(codes), torch.stack(alone))
    assert len({tuple(row.tolist()) for row in alone}) == 11


def test_out_of_memory_is_one_line_that_says_what_would_fit(loaded, monkeypatch):
    def sampler(*given, **options):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation")

    advice = {3: "3 images at once are too many; --batch_size 1 needs half", 1: "the model is too large"}
    for count in advice:
        monkeypatch.setitem(vars(loaded), "sampler", sampler)
        with one_line(f"^out of memory: {advice[count]}"):
            generate_batch(loaded, circles(loaded, count))
    assert len(generate_batch(loaded, circles(loaded, 2))) == 2  # with a new sampler


def test_a_callback_can_stop_sampling(loaded):
    specs = mixed_specs(loaded)[1:2]
    codes = generate_batch(loaded, specs)

    def give_up(codes):
        if codes.shape[1] == 5:
            raise InterruptedError("nobody waits")

    with pytest.raises(InterruptedError, match="nobody waits"):
        generate_batch(loaded, specs, give_up)
    assert torch.equal(generate_batch(loaded, specs), codes)


def test_what_cannot_be_generated_is_refused_in_one_line(loaded):
    for prompt, sampling, message in (
        ("", {}, "no words"),
        ("日本", {}, "no words"),
        ("red " * 17, {}, "17 tokens long; the model reads at most 16"),
        ("red", {"temperature": 0}, "temperature is 0"),
        ("red", {"top_k": 1.5}, "top_k is 1.5"),
        ("red", {"top_p": 0}, "top_p is 0"),
        ("red", {"colour": 1}, "colour: unknown setting"),
    ):
        with one_line(message):
            plan_image(loaded, prompt, 0, sampling)


def test_guidance_needs_caption_dropout(tiny_checkpoint, tmp_path, loaded):
    saved = torch.load(tiny_checkpoint, weights_only=True)
    saved["settings"]["caption_dropout"] = 0.0
    saved["sampling"]["cond_scale"] = 1.5  # the run's mistake
    torch.save(saved, tmp_path / "plain.pt")
    plain = load(tmp_path / "plain.pt", device="cpu")
    with pytest.raises(ValueError, match="cond_scale is 2, but .*plain.pt was trained without --caption-dropout"):
        plan_image(plain, "red", 0, {"cond_scale": 2})
    assert plan_image(plain, "red", 0).sampling.cond_scale == 1
    assert plan_image(loaded, "red", 0, {"cond_scale": 2}).sampling.cond_scale == 2


def test_an_image_prompt_keeps_its_rows(loaded, drawn_pictures):
    path = sorted(drawn_pictures.glob("*.png"))[3]
    upper = encode_kept_rows(loaded, path, 3)
    pixels = to_image(loaded.decode(torch.cat([upper, torch.zeros(4, dtype=torch.long)])[None])[0])
    for image in (path, pixels):
        given = encode_kept_rows(loaded, image, 0.5)
        codes = generate_batch(loaded, circles(loaded, 5, given))
        assert len(given) == 8 and all(torch.equal(row[:8], given) for row in codes)
        assert len({tuple(row.tolist()) for row in codes}) == 5
    assert torch.equal(upper[:8], encode_kept_rows(loaded, path, 0.3))
    with pytest.raises(ValueError, match="the whole image is kept"):
        circles(loaded, 1, torch.zeros(16, dtype=torch.long))


def test_scores_are_those_of_the_models_own_logits(loaded):
    model, device = loaded.model, loaded.backend.device
    text = torch.stack([spec.tokens for spec in mixed_specs(loaded)[:3]]).to(device)
    codes = torch.randint(64, (3, 16), generator=torch.Generator().manual_seed(0)).to(device)
    with torch.no_grad():
        logits = model(text, codes)[:, model.text_seq_len :]  # the whole vocabulary, masked
        expected = logits.log_softmax(-1).gather(-1, (codes + model.num_text_tokens)[..., None]).sum((1, 2))
    torch.testing.assert_close(ranking.log_likelihood(model, text, codes), expected, atol=1e-3, rtol=0)


def test_the_best_are_kept_in_order(loaded):
    specs = circles(loaded, 6)
    codes = generate_batch(loaded, specs)
    text = torch.stack([spec.tokens for spec in specs])
    scores = ranking.log_likelihood(loaded.model, text.to(loaded.backend.device), codes.to(loaded.backend.device)).cpu()
    best = ranking.best_of(loaded, specs, codes, 2)
    assert [index for index, _ in best] == scores.argsort(descending=True)[:2].tolist()
    found = [values["likelihood"] for _, values in best]
    assert found == pytest.approx(scores.sort().values.flip(0)[:2].tolist(), abs=1e-3)

    def greenness(images, prompts):  # in place of CLIP
        assert set(prompts) == {"a red circle"}
        return torch.tensor([sum(image.getpixel((x, x))[1] for x in range(32)) for image in images]).float()

    best = ranking.best_of(loaded, specs, codes, 3, greenness)
    expected = greenness([to_image(pixels) for pixels in loaded.decode(codes)], ["a red circle"] * 6)
    assert [index for index, _ in best] == expected.argsort(descending=True, stable=True)[:3].tolist()


def test_previews_show_the_rows_so_far(loaded):
    shown, specs = [], circles(loaded, 2)
    show_all = previews.Preview(loaded, 1, lambda images, row: shown.append((images, row)), share=1e9)
    codes = generate_batch(loaded, specs, show_all)
    assert [row for _, row in shown] == [1, 2, 3]
    assert torch.equal(codes, generate_batch(loaded, specs))
    frames = previews.animation_frames(loaded, codes)
    assert len(frames) == 4
    for images, row in [*shown, *zip(frames, range(1, 5))]:
        expected = loaded.model.vae.decode(codes[:, : 4 * row].to(loaded.backend.device), row).cpu()
        expected = (expected * 255).permute(0, 2, 3, 1).numpy()
        found = np.stack([np.asarray(image) for image in images])
        assert found.shape == (2, 32, 32, 3) and (found[:, 8 * row :] == 128).all()
        assert np.abs(found[:, : 8 * row] - expected).max() < 0.51
    rows = []
    generate_batch(loaded, specs, previews.Preview(loaded, 2, lambda images, row: rows.append(row), share=1e9))
    assert rows == [2]


HUGE = 2**20
HOSTILE = {  # what a file says of its network
    "width": {"dim": HUGE},
    "depth": {"depth": 10**9},
    "no depth": {"depth": -1},
    "heads": {"heads": HUGE, "dim_head": HUGE},
    "text": {"text_seq_len": 2**40},
    # Its positions fit into the file, and its attention mask into no memory.
    "long text": {"text_seq_len": HUGE, "dim": 1, "heads": 1, "dim_head": 1},
    "word": {"dim": "wide"},
    "pattern": {"attn_types": [["full"]]},
    "codes": {"n_embed": 2**40},
    "blocks": {"num_res_blocks": 10**9},
    "levels": {"ch_mult": [1] * 40, "resolution": 2**40},
    "channels": {"ch": 32 * HUGE},
    "patches": {"patch_size": 2**40, "in_channels": 3 * 2**80, "out_ch": 3 * 2**80},
    "shared values": {},
}


def test_hostile_sizes_are_refused_in_little_memory(tiny_checkpoint, tmp_path):
    for name, changes in HOSTILE.items():
        saved = checkpoint.read(tiny_checkpoint)
        params = saved["vae_params"]["params"]
        saved.pop("versions")  # as in older files, whose patterns are renamed
        for key, value in changes.items():
            (place,) = (part for part in (saved["hparams"], params, params["ddconfig"]) if key in part)
            place[key] = value
        if not changes:
            text_emb = saved["weights"]["model.text_emb.weight"]
            saved["weights"]["model.text_emb.weight"] = torch.zeros(1).expand(text_emb.shape)
        torch.save(saved, tmp_path / f"{name}.pt")
    code = f"""if True:
        import pathlib, resource, time
        from generation.loading import load
        load({str(tiny_checkpoint)!r}, device="cpu")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for path in sorted(pathlib.Path({str(tmp_path)!r}).glob("*.pt")):
            started = time.process_time()
            try:
                print(path.stem, "was loaded:", load(path, device="cpu"))
            except ValueError as error:
                assert "\\n" not in str(error) and len(str(error)) < 400, error
            assert time.process_time() - started < 5, path
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"""
    limit = lambda: resource.setrlimit(resource.RLIMIT_AS, (16 * 2**30,) * 2)  # noqa: E731  spares the machine
    ended = python("-c", code, preexec_fn=limit)
    assert ended.returncode == 0, ended.stderr[-2000:]
    *loaded, kilobytes = ended.stdout.splitlines()
    assert loaded == [] and int(kilobytes) < 100_000


def test_words_and_examples_go_from_training_into_exported_files(tiny_checkpoint, tmp_path):
    path = tmp_path / "exported.safetensors"
    checkpoint.write_safetensors(path, checkpoint.read(tiny_checkpoint), half=True)
    models = [load(one, device="cpu", precision="fp32") for one in (tiny_checkpoint, path)]
    for loaded in models:
        assert loaded.words == models[0].words and loaded.words["circle"] > 1
        assert loaded.examples == models[0].examples and 0 < len(loaded.examples) <= 12
        assert loaded.unknown_words("A red Circle, two dogs and dogs!") == ["two", "dogs", "and"]
