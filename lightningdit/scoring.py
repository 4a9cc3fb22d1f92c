"""How good a run's samples are while it trains: a Frechet distance to a reference every score.every steps, of the EMA weights.

Images go from the sampler straight to the feature network; of their features float64 sums are kept, which the processes merge.
"""
import dataclasses

import torch

from . import evaluation, latents, remote, sampler
from .config import require
from .distributed import world
from .features import load_extractor
from .optional import progress_bar


def open_scorer(config, tokenizer, device):
    """The Scorer that the configuration asks for, or None. Whatever it lacks is missed here, before training.

    Raises: ValueError that names the field, the missing weights or the missing reference.
    """
    score, data = config.score, config.data
    if not score.every:
        return None
    if score.extractor == "digits" and data.path is not None:
        if world()[0] == 0:
            print("no scores: the extractor digits knows the bundled digits only; score.extractor names another")
        return None
    require(score.num >= world()[1], "score.num", score.num, f"at least one sample for each of the {world()[1]} processes")
    reference = score.reference or data.path or "digits"
    require(score.reference or not (remote.is_url(reference) or latents.is_store(reference)), "score.reference", None,
            f"ADM's .npz or images: {reference} holds latents")
    extractor = load_extractor(score.extractor, score.weights, device)
    require(tokenizer.image_channels <= extractor.channels, "score.extractor", score.extractor,
            f"one for images of {tokenizer.image_channels} channels, as those of the tokenizer")
    rank, processes = world()
    reference = evaluation.load_reference(reference, extractor, image_size=data.image_size, cache=data.cache or f"{config.run}/latents",
                                          workers=data.workers, batch_size=config.sample.batch_size, rank=rank, world=processes)
    return Scorer(config, tokenizer, extractor, reference, device)


class Scorer:
    """Measures samples against a reference. Draws no random number but those of its seeds: training does not notice it."""

    def __init__(self, config, tokenizer, extractor, reference, device):
        self.config, self.tokenizer, self.extractor, self.device = config, tokenizer, extractor, device
        self.reference = dataclasses.replace(reference, features=None)  # for the distances its moments are enough

    def __call__(self, model, autocast):
        """Draws score.num images, of all classes alike, from the seed sample.seed on, the same at every score.

        Every process calls it: they share the images, and pass as often through a sharded model.
        Returns: {"score": the first metric's name, "samples": score.num, metric: value, ...}.
        """
        (rank, processes), score, sample = world(), self.config.score, self.config.sample
        settings = self.config.sampling_arguments() | dict(num_steps=score.num_steps or sample.num_steps)
        collector, each = evaluation.Collector(self.extractor, keep=0), -(-score.num // processes)
        for start in progress_bar(range(0, each, sample.batch_size), desc="scoring", unit="batch", leave=False, delay=5, disable=rank != 0):
            own = [rank + i * processes for i in range(start, min(start + sample.batch_size, each))]
            drawn = [min(i, score.num - 1) for i in own]
            with autocast:
                images = sampler.sample_images(model, self.tokenizer, labels=[i % self.config.data.num_classes for i in drawn],
                                               seeds=[sample.seed + i for i in drawn], device=self.device, **settings)
            count = sum(i < score.num for i in own)
            if count:
                collector.update(images[:count], torch.tensor(own[:count]))
        rows = evaluation.compare(collector.result(), self.reference, self.extractor)
        values = {row["metric"]: row["value"] for row in rows if row["value"] is not None}
        return dict(score=next(iter(values)), samples=score.num) | values
