"""The count of multiply-accumulates against PyTorch's own counter and the DiT paper."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from msf import MSF, PRESETS, MSFConfig, Preset, StageConfig
from msf.flops import DIT_STEPS, DIT_XL_2, dit_baseline, peak_teraflops, stage_costs

STAGES = (
    StageConfig(width=24, depth=1, heads=3, patch=1, mlp_ratio=2.5),
    StageConfig(width=16, depth=3, heads=2, patch=2),
    StageConfig(width=8, depth=2, heads=1, patch=4),
)


def config(levels: int, num_classes: int, qk_norm: bool | str, mlp: str = "gelu") -> MSFConfig:
    return MSFConfig(
        image_size=(16, 32),
        channels=3,
        num_classes=num_classes,
        stages=STAGES[: levels + 1],
        steps=(7, 5, 3)[: levels + 1],
        qk_norm=qk_norm,
        mlp=mlp,
    )


def attention_flops(qkv: torch.Size, *_: object, out_shape: object = None, **__: object) -> int:
    """q k^T and its product with v at 2 a MAC; the counter does not see into the operator."""
    batch, tokens, width = qkv
    return 2 * 2 * batch * tokens**2 * (width // 3)


@pytest.mark.parametrize("levels", [0, 1, 2])
@pytest.mark.parametrize(
    ("num_classes", "qk_norm", "mlp"),
    [(0, True, "gelu"), (10, False, "swiglu"), (0, "layer", "gelu")],
)
def test_counts_are_those_of_the_modules(
    levels: int, num_classes: int, qk_norm: bool | str, mlp: str
) -> None:
    model = MSF(config(levels, num_classes, qk_norm, mlp))
    costs = stage_costs(model.config)
    assert [cost.name for cost in costs] == list(model.config.stage_names)
    for index, (stage, cost) in enumerate(zip(model.stages, costs, strict=True)):
        assert cost.parameters == sum(p.numel() for p in stage.parameters())
        x, t = torch.randn(1, 3, *model.config.stage_size(index)), torch.rand(1)
        y = torch.zeros(1, dtype=torch.int64) if num_classes else None
        prior = (torch.randn_like(x), torch.rand(1)) if index else ()
        counter = FlopCounterMode(
            display=False, custom_mapping={torch.ops.msf.attention: attention_flops}
        )
        with counter, torch.no_grad():
            stage(x, t, y, *prior)
        assert counter.get_total_flops() == 2 * cost.macs


@pytest.mark.parametrize("pixels", DIT_XL_2)
def test_dit_xl_2_costs_what_its_paper_says(pixels: int) -> None:
    (cost,) = stage_costs(PRESETS[f"sit-xl-{pixels}"].model)
    assert cost.macs / 1e9 == pytest.approx(DIT_XL_2[pixels], rel=1e-3)
    assert cost.steps == DIT_STEPS


@pytest.mark.parametrize(("pixels", "share"), [(256, 0.50), (512, 0.25)])
def test_the_papers_claims_on_cost_hold(pixels: int, share: float) -> None:
    config = PRESETS[f"msf-xl-{pixels}"].model
    found = dit_baseline(config)
    assert found is not None and found[0] == pixels
    assert sum(cost.macs_per_image for cost in stage_costs(config)) / 1e9 <= share * found[1]


def test_steps_multiply_a_stages_cost() -> None:
    costs, other = stage_costs(config(1, 0, True)), stage_costs(config(1, 0, True), (14, 1))
    assert other[0].macs_per_image == 2 * costs[0].macs_per_image
    assert other[1].macs_per_image == costs[1].macs


@pytest.mark.parametrize("steps", [(1,), (1, 2, 3), (1, 0)])
def test_bad_steps(steps: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="steps must be 2 positive numbers, one a stage"):
        stage_costs(config(1, 0, True), steps)


def test_no_baseline_where_none_was_published() -> None:
    assert dit_baseline(config(1, 0, True)) is None
    assert dit_baseline(PRESETS["digits"].model) is None


def test_textures_and_their_baseline_train_and_sample_on_equal_flops() -> None:
    msf, dit = PRESETS["textures-16"], PRESETS["textures-16-sit"]

    def training(chosen: Preset) -> int:
        steps = zip(stage_costs(chosen.model), chosen.training.steps)
        return chosen.training.batch_size * sum(cost.macs * n for cost, n in steps)

    def sampling(chosen: Preset) -> int:
        return sum(cost.macs_per_image for cost in stage_costs(chosen.model))

    assert training(msf) == pytest.approx(training(dit), rel=0.01)
    assert sampling(msf) == pytest.approx(sampling(dit), rel=0.02)


def test_peaks_are_those_of_the_device():
    assert peak_teraflops("NVIDIA H100 PCIe") == 756
    assert peak_teraflops("NVIDIA H100 80GB HBM3") == 989
    assert peak_teraflops("NVIDIA GeForce RTX 2060") is None
