"""Measure how close generated images are to real ones that training never saw.

Of a model: Frechet distance, kernel distance, precision, recall and class accuracy, each with a
95 % interval and beside the same figure of real images (the floor), and the gap between sampling on
true and on generated bases. Give --steps several times to compare settings. Features are those of a
small network trained on the same data, so nothing published compares with these distances. Data
that lost classes or images which the model was trained on, or has others in their place, is
refused, but for --data-changed.

Of images in FILE.npz, as ADM's or msf sample's, against --reference: FID, sFID, Inception Score,
precision, recall and KID by ADM's protocol, in the features of --inception. They are kept beside
the files.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...files import printable
from ...progress import say
from ...training.config import RunConfig, read_run
from ...training.identity import compare_data, fingerprint
from .. import models, outputs, protocol, sampling, settings

if TYPE_CHECKING:
    from torch import Tensor

    from ...data import ImageData
    from ...evaluation import Generate
    from ...flops import StageCost
    from ...model import MSF
    from ...sampling_config import SamplingConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", type=Path, metavar="DIR|FILE.npz", help="a trained model's folder, or images"
    )
    parser.add_argument("--data", metavar="SOURCE", help="default: what the model was trained on")
    parser.add_argument(
        "--data-changed",
        action="store_true",
        help="evaluate though classes or images are not those the model was trained on",
    )
    parser.add_argument(
        "--samples",
        type=int,
        metavar="N",
        help="images (default: as test images, up to 2,000); of more there is no floor",
    )
    parser.add_argument(
        "--steps",
        nargs="+",
        type=int,
        action="append",
        metavar="N",
        help="one for all stages or one a stage; may be given several times",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the whole evaluation")
    sampling.add_arguments(parser)
    parser.add_argument(
        "--out", type=outputs.place, metavar="FILE", help="also write the JSON document here"
    )
    outputs.add_overwrite_argument(parser)
    models.add_device_arguments(parser)
    protocol.add_arguments(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    if protocol.is_for(args.model):
        return protocol.run(args)
    protocol.check_not_given(args)
    return _run(args)


def _run(args: argparse.Namespace) -> dict[str, Any]:
    from ...data import HOLDOUT, is_latents, load_data
    from ...evaluation import Evaluator
    from ...flops import stage_costs
    from ...training.ranks import Ranks
    from ...training.skipped import Skipped

    device = models.device(args)
    if args.out:
        outputs.check_file(args.out, args.overwrite)
        outputs.check_not_read(args.out, *models.files(args.model))
    model = models.load(args.model, device)
    config, run = model.config, read_run(args.model)
    source = _source(args, run)
    if is_latents(source):
        raise ValueError(
            f"{printable(source)}: holds latents, and an evaluation compares pictures; msf sample "
            "--out FILE.safetensors writes latents for the VAE to decode"
        )
    all_steps = [settings.one_a_stage(steps, config) for steps in args.steps or [config.steps]]
    costs = [stage_costs(config, steps) for steps in all_steps]
    samplings = [sampling.read(args, steps, config) for steps in all_steps]

    holdout = run.training.holdout if run else HOLDOUT
    if not holdout:
        raise ValueError(
            f"{args.model}: nothing was held out of its training (holdout 0), so there are no new "
            f"images to compare with; train with --holdout {HOLDOUT}, say"
        )
    data = load_data(
        source,
        split="test",
        image_size=config.image_size,
        channels=config.channels,
        num_classes=config.num_classes,
        holdout=holdout,
    )
    if data.left_out:
        say(f"data: {printable(source)}: {data.summary()}")
    if run:
        _check_data(args, run, source, data)
    Skipped(data.total, data.empty_files).report(Ranks(), {})
    evaluator = Evaluator(
        source,
        image_size=config.image_size,
        channels=config.channels,
        num_classes=config.num_classes,
        holdout=holdout,
        num_samples=args.samples,
        seed=args.seed,
        batch_size=args.batch_size,
        progress=True,
    )
    if not evaluator.paired:
        say(
            f"{len(evaluator.labels):,} samples are compared with all "
            f"{evaluator.settings['num_reference']:,} images of the test split; without a floor, "
            "which takes as many"
        )
    results = []
    for steps, cost, each in zip(all_steps, costs, samplings, strict=True):
        say(f"evaluating {len(evaluator.seeds)} images at steps {steps}")
        report = evaluator.evaluate(
            _generator(model, each, args),
            true_bases=config.levels > 0,
            conditional=config.num_classes > 0 and config.label_dropout < 1,
        )
        gmacs = _gmacs(cost, each.stages(config)[0].solver)
        results.append({"steps": steps, "gmacs_per_image": gmacs, "report": report})
    document = {"model": str(args.model), "data": source, "results": results}
    if args.out:
        outputs.write_json(args.out, document)
    return document


def text(document: dict[str, Any]) -> str:
    if "results" not in document:
        return protocol.text(document)
    return "\n\n".join(
        f"steps {' '.join(map(str, result['steps']))}, "
        f"{result['gmacs_per_image']:.4g} GMACs an image without guidance\n"
        f"{result['report'].table()}"
        for result in document["results"]
    )


def _source(args: argparse.Namespace, run: RunConfig | None) -> str:
    if args.data is not None:
        return settings.data_source(args.data)
    if run:
        return run.data
    raise ValueError(f"{args.model}: has no training.json to know its data by; give --data")


def _check_data(args: argparse.Namespace, run: RunConfig, source: str, data: ImageData) -> None:
    """Say what has changed in the data since the ``run``. Raise ValueError where it is not the data
    that the model was trained on."""
    now = replace(
        run, data=source, class_names=data.class_names, fingerprint=fingerprint(data.files)
    )
    change = compare_data(
        args.model,
        run,
        now,
        data.files,
        data.digest,
        accepted=args.data_changed,
        otherwise="evaluate on",
    )
    if change:
        say(f"{args.model}: evaluating with {change}")


def _gmacs(costs: list[StageCost], solver: str) -> float:
    """Return the GMACs of sampling one image without guidance."""
    from ...solver import evaluations

    return sum(cost.macs * evaluations(cost.steps, solver) for cost in costs) / 1e9


def _generator(model: MSF, config: SamplingConfig, args: argparse.Namespace) -> Generate:
    import torch

    def generate(labels: Tensor, seeds: list[int], true_images: Tensor | None) -> Tensor:
        bases = None
        if true_images is not None:
            bases = model.pyramid.split(true_images.to(model.pyramid.mean.device))[0]
        batches = sampling.generate(
            model,
            model.trained_labels(labels),
            seeds,
            config,
            args,
            bases=bases,
        )
        return torch.cat([images for images, _ in batches])

    return generate
