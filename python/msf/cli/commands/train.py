"""Train a model, stage by stage, on images.

A folder of images (PNG, JPEG, WebP, BMP, GIF's first frame, TIFF) has one subfolder a class, in
which they may lie deeper; without subfolders there are no classes. By the hash of its name an image
is for training (80 %), for the evaluation's features (10 %) or for its test (10 %); --holdout says
otherwise. It is resized until it just covers the model's image size and cropped at the centre; what
is transparent shows white. Images that cannot be read are skipped, but more than one in a hundred
are an error. Before the first step up to 16,384 images are read for the mean and deviation of every
scale. A folder that msf encode made holds latents, and each step draws its own from their
posteriors.

--out gets the model (config.json, model.safetensors), what is needed to continue (training.json,
state-*.safetensors), metrics.jsonl, tensorboard/, sample grids and loss.png. Ctrl-C saves and
stops, an error after the first step saves too, and --resume continues. Under torchrun its processes
train together, one a GPU; SIGTERM and a closed terminal save and stop them too.

--config names a JSON file {"model": {...}, "training": {...}} with the fields of MSFConfig and
TrainingConfig, for instance

  {"model": {"image_size": [16, 16], "channels": 1, "num_classes": 3, "steps": [16, 4],
             "stages": [{"width": 128, "depth": 4, "heads": 4, "patch": 1},
                        {"width": 128, "depth": 4, "heads": 4, "patch": 1}]},
   "training": {"steps": [1000, 1000], "batch_size": 128, "learning_rate": 0.001}}
"""

from __future__ import annotations

import argparse
import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...config import MSFConfig
from ...files import behind_links
from ...pretrained import CONFIG_FILE, missing
from ...training.config import CHECKPOINTING, PARALLEL, PRECISIONS, TrainingConfig
from .. import models, outputs, settings, tables
from ..errors import Failure
from ..sampling import number

SAMPLE_EVERY = TrainingConfig(steps=(1,)).sample_every
CHANGES = (
    "batch_size",
    "learning_rate",
    "sample_every",
    "checkpoint_every",
    "precision",
    "parallel",
    "accumulation",
    "checkpointing",
    "compile",
    "flip",
    "holdout",
    "wandb",
    "seed",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    settings.add_arguments(parser, required=False)
    parser.add_argument(
        "--from",
        dest="start",
        type=Path,
        metavar="DIR",
        help="begin with the weights of the model in this folder, whose statistics are measured "
        "anew; without --preset and --config its configuration and training are kept, but for "
        "other options; one of a single stage may begin the base of one with residuals",
    )
    parser.add_argument(
        "--data",
        required=True,
        metavar="SOURCE",
        help="digits, textures, a folder of images with one subfolder a class, or with images only "
        "for a model without classes, or a folder of latents",
    )
    parser.add_argument("--out", type=outputs.place, required=True, metavar="DIR")
    parser.add_argument(
        "--stage", metavar="NAME", help="train this stage only, e.g. base or residual"
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        choices=("auto",),
        help="continue the run that --out holds, if any, with its own settings where --preset and "
        "--config are left out; model, seed and holdout must stay, others and the place of the "
        "data may change",
    )
    parser.add_argument(
        "--data-changed",
        action="store_true",
        help="with --resume: continue though classes or images are not those the run began with",
    )
    parser.add_argument(
        "--steps", nargs="+", type=int, metavar="N", help="one for all stages or one a stage"
    )
    parser.add_argument("--batch-size", type=int, metavar="N")
    parser.add_argument("--learning-rate", type=number, metavar="RATE")
    parser.add_argument(
        "--sample-every",
        type=int,
        metavar="N",
        help="steps from one sample grid and loss on held-out images to the next (default "
        f"{SAMPLE_EVERY:,}, or the preset's)",
    )
    parser.add_argument(
        "--checkpoint-every",
        type=int,
        metavar="N",
        help="steps from one checkpoint to the next (default: the preset's, or as sample grids)",
    )
    parser.add_argument("--precision", choices=PRECISIONS)
    parser.add_argument(
        "--parallel",
        choices=PARALLEL,
        help="under torchrun: every process holds all weights (ddp, the default) or a part (fsdp)",
    )
    parser.add_argument(
        "--accumulation", type=int, metavar="N", help="take each process's batch in N parts"
    )
    parser.add_argument(
        "--checkpointing",
        choices=CHECKPOINTING,
        help="compute again in the backward what blocks keep: all (full), or all but products and "
        "attention (selective)",
    )
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="compile every block (torch.compile), or not (the default)",
    )
    parser.add_argument(
        "--flip",
        action=argparse.BooleanOptionalAction,
        help="mirror half of the images, or not (default: not, but for presets of ImageNet)",
    )
    parser.add_argument(
        "--holdout",
        type=number,
        metavar="FRACTION",
        help="how much of a folder is kept for evaluations, by the hash of each name, half for "
        "their features and half for their test; 0: train on all (default 0.2)",
    )
    parser.add_argument(
        "--wandb", metavar="PROJECT", help="also log to this project of Weights & Biases"
    )
    parser.add_argument("--seed", type=int, metavar="S")
    parser.add_argument(
        "--num-classes", type=int, metavar="K", help="those of the data, or 0 for no labels"
    )
    parser.add_argument(
        "--image-size",
        nargs="+",
        type=int,
        metavar="N",
        help="side, or height and width, of images, or of latents, in place of the model's",
    )
    parser.add_argument(
        "--vae", type=Path, metavar="FOLDER", help="an AutoencoderKL to decode sample grids with"
    )
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    models.add_device_arguments(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Return what the run's folder tells at the end, nothing in other processes than the first."""
    if args.data_changed and not args.resume:
        raise ValueError("--data-changed is for a run that --resume continues; add --resume")
    config, training = _settings(args)
    device = models.device(args)
    from ...pipeline import decoder_of
    from ...training import metrics
    from ...training.interrupts import Interrupted
    from ...training.ranks import FailedElsewhere
    from ...training.train import train

    is_first = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun starts
    needs_vae = args.vae and is_first  # which alone shows samples
    vae = decoder_of(config, args.data, args.vae, device) if needs_vae else None
    # TensorBoard writes in a thread; when that fails, the main thread raises its error once more.
    threading.excepthook = lambda _: None
    try:
        train(
            config,
            training,
            settings.data_source(args.data),
            args.out,
            stages=[args.stage] if args.stage else None,
            resume=args.resume is not None,
            data_changed=args.data_changed,
            start=behind_links(args.start) if args.start else "",
            decode=vae.decode if vae else None,
            device=device,
            progress=not args.quiet,
        )
    except Interrupted as error:
        raise Failure(str(error) if is_first else "", 130) from None
    except FailedElsewhere:  # where it is told
        raise Failure("", 1) from None
    finally:
        threading.excepthook = threading.__excepthook__
    if not is_first:
        return {}
    rows, _ = metrics.read(args.out / "metrics.jsonl", config.stage_names)
    return {"out": str(args.out), "stages": {row["stage"]: row for row in rows}}


def text(document: dict[str, Any]) -> str:
    rows = [(name, row["step"], row["loss"]) for name, row in document["stages"].items()]
    return f"{document['out']}\n" + tables.table(("stage", "step", "loss"), rows)


def _settings(args: argparse.Namespace) -> tuple[MSFConfig, TrainingConfig]:
    """Return the preset or file with the command line's changes."""
    training: TrainingConfig | None
    if not (args.preset or args.config) and args.resume and (args.out / CONFIG_FILE).exists():
        config, training = settings.of_run(args.out)
    elif args.preset or args.config or args.start:
        config, training = settings.read(args)
    else:
        why = f"{args.out}: {missing(args.out)}, so --resume has no settings; "
        raise ValueError(
            f"{why if args.resume else ''}give --preset, --config, or --from a model's folder"
        )
    if training is None:
        raise ValueError(f'{args.config}: key "training" is missing')
    changes = {name: getattr(args, name) for name in CHANGES if getattr(args, name) is not None}
    if args.steps:
        changes["steps"] = tuple(settings.one_a_stage(args.steps, config))
    if args.num_classes is not None:
        config = replace(config, num_classes=args.num_classes)
    if args.image_size:
        sides = args.image_size
        config = replace(config, image_size=sides * 2 if len(sides) == 1 else sides)
    return config, replace(training, **changes)
