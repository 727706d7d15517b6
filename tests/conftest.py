import os

import pytest
import torch

torch.set_num_threads(1)  # the suite runs one process per core


def pytest_collection_modifyitems(config, items):
    interpreted = os.environ.get("TRITON_INTERPRET", "0") == "1"
    for item in items:
        if "interpreter" in item.keywords and not interpreted:
            item.add_marker(pytest.mark.skip(reason="needs TRITON_INTERPRET=1 (make test runs these second)"))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
