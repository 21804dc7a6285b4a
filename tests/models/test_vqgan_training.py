"""A VQGAN's training step, the beginning of its codebook, and its figures, on small random pictures."""

from types import SimpleNamespace

import pytest
import torch

from models.vae import VQGan, check_params
from models.vqgan_training import VQGanTrainer, evaluate, reconstruction_loss, to_pixels


def settings(**changed):
    wanted = {"codebook_weight": 1.0, "commitment": 0.25, "rate_weight": 0.0, "revival_interval": 0, "disc_weight": 0.0}
    wanted.update(edge_weight=0.0, decoder_of=None, learning_rate=2e-3)
    return SimpleNamespace(**{**wanted, "disc_start": 0, "batch_size": 4, "max_steps": 100, **changed})


@pytest.fixture
def pictures():
    """16 pictures of 16 cells, each cell one of five colours: uint8 (16, 3, 32, 32)."""
    torch.manual_seed(0)
    colours = torch.randint(256, (5, 3), dtype=torch.uint8)
    cells = colours[torch.randint(5, (16, 4, 4))]  # (16, 4, 4, 3)
    return cells.permute(0, 3, 1, 2).repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)


def trainer_of(**changed):
    torch.manual_seed(0)
    sizes = {"ch": 32, "ch_mult": [1], "num_res_blocks": 1, "attn_resolutions": [], "resolution": 4, "z_channels": 16}
    sizes.update(in_channels=192, out_ch=192, double_z=False)
    model = VQGan(check_params({"ddconfig": sizes, "n_embed": 12, "embed_dim": 8, "patch_size": 8}))
    optimizer = torch.optim.Adam(model.parameters())
    return VQGanTrainer(model, [optimizer], settings(**changed), torch.device("cpu"))


def test_learns_to_give_pictures_back(pictures):
    trainer = trainer_of()
    before = evaluate(trainer.model, pictures, 8).psnr
    for _ in range(20):
        trainer.step(pictures, 1.0)
    assert trainer.start_codebook(pictures) == 5  # as many as there are different cells
    for _ in range(30):
        figures = trainer.step(pictures, 1.0)
    after = evaluate(trainer.model, pictures, 8)
    assert after.psnr > before + 10
    assert after.psnr == pytest.approx(-10 * torch.log10(figures["mse"]).item(), abs=3)
    assert 2 <= after.codes_used <= 5
    resumed = trainer_of(learning_rate=5e-4)  # another one than the run's
    resumed.load_state_dict(trainer.state_dict())
    resumed.step(pictures, 0.5)
    assert [group["lr"] for group in resumed.optimizers[0].param_groups] == [2.5e-4]


def test_an_entry_begins_at_the_mean_latent_of_the_cells_that_look_alike(pictures):
    trainer = trainer_of()
    trainer.start_codebook(pictures)
    with torch.no_grad():
        latents = trainer.model.encode(to_pixels(pictures)).permute(0, 2, 3, 1).flatten(0, 2)  # (256, 8)
    looks = pictures[:, :, ::8, ::8].permute(0, 2, 3, 1).flatten(0, 2)  # (256, 3)
    means = {tuple(look.tolist()): latents[(looks == look).all(dim=1)].mean(dim=0) for look in looks}
    begun = trainer.model.codebook[: len(means)]
    for mean in means.values():
        assert (begun - mean).abs().sum(dim=1).min() < 1e-4


def test_a_code_in_frequent_use_attracts_more(pictures):
    trainer = trainer_of(rate_weight=0.5)
    trainer.start_codebook(pictures)
    trainer.usage[:] = 0
    trainer.usage[3] = 1000
    with torch.no_grad():
        latents = trainer.model.encode(to_pixels(pictures))
    with_bits = (trainer._choose(latents) == 3).sum()
    trainer.settings.rate_weight = 0.0
    assert with_bits > (trainer._choose(latents) == 3).sum()


def test_codes_out_of_use_begin_anew_where_pictures_come_back_badly(pictures):
    trainer = trainer_of(revival_interval=2)
    trainer.start_codebook(pictures)
    unused = trainer.model.codebook[-1].clone()  # out of reach: there are only five different cells
    for _ in range(4):
        trainer.step(pictures, 1.0)
    assert not torch.equal(trainer.model.codebook[-1], unused)
    assert trainer.model.codebook.abs().max() < unused.abs().max()


def test_the_discriminator_waits_for_its_start_then_trains(pictures):
    trainer = trainer_of(disc_weight=0.5, disc_start=1)
    before = [parameter.clone() for parameter in trainer.discriminator.parameters()]
    trainer.step(pictures[:4], 1.0)
    assert all(torch.equal(old, new) for old, new in zip(before, trainer.discriminator.parameters()))
    trainer.step(pictures[:4], 1.0)
    assert not all(torch.equal(old, new) for old, new in zip(before, trainer.discriminator.parameters()))


def test_edges_weigh_more():
    pixels = torch.full((1, 3, 12, 12), -1.0)
    pixels[..., 6:] = 1.0  # contrast 1 in columns 5 and 6, which a weight of 4 counts five times
    weights = torch.ones(12)
    weights[5:7] = 5.0
    for column in range(12):
        decoded = pixels.clone()
        decoded[..., column] += 0.5
        expected = 0.25 * weights[column] / weights.sum()
        assert reconstruction_loss(decoded, pixels, 4.0) == pytest.approx(expected.item(), rel=1e-5)
        assert reconstruction_loss(decoded, pixels, 0.0) == pytest.approx(0.25 / 12, rel=1e-5)
