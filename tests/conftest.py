"One thread for every test: networks this small only lose by sharing, and results must not depend on the machine."
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("PYTHONWARNINGS", "ignore")

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def settings_of_one_command_only():
    "`--accumulate` and `--precision` are handed on in the environment: those of one test are not for the next."
    yield
    for name in ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "WMPO_PRECISION"): os.environ.pop(name, None)
