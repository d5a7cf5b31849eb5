"What several test files share: the smallest policy, and how a command must refuse."
import torch

from wmpo_nb.presets import PolicyConfig
from wmpo_nb.trajectory import ActionStats

SMALL = PolicyConfig(image_size=16, vision_dims=(16,), vision_depths=(3,), vision_heads=(2,), hidden_size=32,
                     intermediate_size=32, num_layers=2, num_heads=2)
STATS = ActionStats(torch.full((7,), -1.0).double(), torch.ones(7).double(), torch.tensor([True] * 6 + [False]))


def refusal(main, capsys, *arguments) -> str:
    "The one line with which the console script `main` refuses `arguments`, with exit code 2."
    assert main(list(arguments)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]
