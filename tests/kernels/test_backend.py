from types import SimpleNamespace

import pytest
import torch

from fastdeit.kernels import backend


@pytest.mark.parametrize("capability, expected", [((7, 5), False), ((8, 0), True), ((8, 9), True), ((12, 1), True)])
def test_gpus_before_ampere_take_plain_pytorch(capability, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    backend.compute_capability.cache_clear()
    tensor = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0))
    assert backend.use_triton(tensor) is expected
    backend.compute_capability.cache_clear()


def test_cpu_tensors_take_triton_in_the_interpreter_alone(monkeypatch):
    for interpreted in (False, True):
        monkeypatch.setattr(backend, "INTERPRETED", interpreted)
        assert backend.use_triton(torch.zeros(1)) is interpreted
