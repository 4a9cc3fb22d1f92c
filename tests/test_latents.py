"""Latent sets: drawing from posteriors, the order of images, the cache."""
import pytest
import torch

from lightningdit import latents
from lightningdit.distributed import generator_for, seed_for


def make(n=10, views=2):
    moments = torch.zeros(views, n, 4, 2, 2)
    for view in range(views):
        moments[view, :, :2] = torch.arange(n).view(n, 1, 1, 1) + 100 * view
    moments[:, :, 2:] = 2 * torch.log(torch.tensor(0.5))  # standard deviation 0.5
    return latents.LatentSet(moments, torch.arange(n) % 3, ["a", "b", "c"], dict(tokenizer="x", data="y", image_size=4))


def test_draw_picks_view_mean_and_deviation():
    data, indices = make(), torch.tensor([3, 7, 3])
    noise = torch.randn(3, 2, 2, 2)
    drawn, labels = data.draw(indices, noise, torch.tensor([0.0, 0.49, 0.99]))
    expected = torch.tensor([3.0, 7.0, 103.0]).view(3, 1, 1, 1) + 0.5 * noise
    torch.testing.assert_close(drawn, expected)
    assert labels.tolist() == [0, 1, 0]


def test_every_image_once_an_epoch_in_an_order_that_depends_on_seed_and_step_only():
    rows = [latents.batch_indices(step, 4, 10, seed=0) for step in range(10)]
    sequence = torch.cat(rows).tolist()
    epochs = [sequence[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs) and len({tuple(epoch) for epoch in epochs}) == 4
    latents._epoch_order.cache_clear()
    assert torch.equal(latents.batch_indices(7, 4, 10, seed=0), rows[7])
    assert not torch.equal(torch.cat([latents.batch_indices(s, 4, 10, seed=1) for s in range(10)]), torch.tensor(sequence))
    assert len(latents.batch_indices(0, 35, 10, seed=0)) == 35  # a batch larger than the set


def test_split_is_disjoint_complete_and_repeatable():
    data = make(20)
    parts = [data.split(0.25, generator_for(0, "split")) for _ in range(2)]
    train, val = parts[0]
    assert len(train) == 15 and len(val) == 5
    seen = torch.cat([train.moments[0, :, 0, 0, 0], val.moments[0, :, 0, 0, 0]])
    assert sorted(seen.tolist()) == list(range(20))
    assert torch.equal(parts[1][1].labels, val.labels) and make().split(0.0, generator_for(0))[1] is None


def test_cache_round_trip_and_damage(tmp_path):
    data = make()
    path = latents.cache_path(tmp_path, data.provenance, True)
    latents.save(data, path)
    back = latents.load(path)
    assert torch.equal(back.moments, data.moments) and back.classes == data.classes and back.provenance == data.provenance
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    other = latents.cache_path(tmp_path, data.provenance | dict(tokenizer="z"), True)
    assert len({path, other, latents.cache_path(tmp_path, data.provenance, False)}) == 3
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="damaged"):
        latents.load(path)


def test_fingerprint_changes_with_the_files(tmp_path):
    (tmp_path / "a").write_text("1")
    before = latents.fingerprint(tmp_path, [tmp_path / "a"])
    assert before == latents.fingerprint(tmp_path, [tmp_path / "a"])
    (tmp_path / "a").write_text("12")
    assert before != latents.fingerprint(tmp_path, [tmp_path / "a"])


def test_seed_rule_mixes():
    seeds = {seed_for(seed, purpose, step) for seed in range(10) for purpose in ("noise", "mirror") for step in range(100)}
    assert len(seeds) == 2000 and all(0 <= seed < 2**63 for seed in seeds)
