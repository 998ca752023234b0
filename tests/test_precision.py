import pytest
import torch

from msf.precision import computes_bf16


@pytest.mark.parametrize("native", [True, False])
def test_auto_precision_follows_what_the_gpu_computes_itself(monkeypatch, native):
    def supported(including_emulation=True):
        return native or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert computes_bf16(torch.device("cuda")) == native
