"Notebook 30: the folded solutions pass its checks, typical mistakes are named, and the loop learns with the student's parts."
import json
import re
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch

NOTEBOOK = Path(__file__).parent.parent / "nbs/30_build_it_yourself.ipynb"
CELLS = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(NOTEBOOK.read_text())["cells"]]
BLANKS = {re.match(r"# your turn: (.+)", source)[1]: i for i, (kind, source) in enumerate(CELLS)
          if kind == "code" and source.startswith("# your turn")}
FOLDED = [re.search(r"<summary>Solution</summary>\n\n```python\n(.*?)```", source, re.S) for kind, source in CELLS if kind == "markdown"]
SOLUTIONS = dict(zip(BLANKS, (found[1] for found in FOLDED if found), strict=True))
CHECKS = {name: next(source for kind, source in CELLS if source.startswith(f"check({name},")) for name in BLANKS}
LOOP, TRAINING = (next(i for i, (_, source) in enumerate(CELLS) if source.startswith(start)) for start in ("## Your parts", "world_model, losses = "))


def run(answers: dict, stop: int = len(CELLS)) -> dict:
    "Names after the code cells before `stop`, the blanks filled with `answers`."
    matplotlib.use("Agg")
    names, filled = {}, {BLANKS[name]: code for name, code in answers.items()}
    for i, (kind, source) in enumerate(CELLS[:stop]):
        if kind == "code": exec(compile(filled.get(i, source), f"<cell {i}>", "exec"), names)
    plt.close("all")
    return names


def test_the_blanks_are_blank_and_the_notebook_goes_on(capsys):
    assert list(BLANKS) == ["modulate", "causal_attention", "velocity_target", "noisy_windows", "verdict", "advantages", "policy_loss"]
    assert run({}, LOOP)["mine"] == {}
    assert capsys.readouterr().out.count("not written yet") == len(BLANKS)


def test_the_solutions_pass(capsys):
    assert set(run(SOLUTIONS, LOOP)["mine"]) == set(BLANKS)
    assert capsys.readouterr().out.count("✓") == len(BLANKS)


# what to replace in the solution, and what the student should read
MISTAKES = [
    ("modulate", "(1 + scale)", "scale", "the factor is 1 + scale"),
    ("modulate", "x.shape[-1:]", "x.shape[-2:]", "mean 0 over its channels"),
    ("modulate", "+ shift", "+ shift.mean(1, keepdim=True)", "the shift is added"),
    ("modulate", "return ", "", "is there a return"),
    ("causal_attention", ".masked_fill(later, float(\"-inf\"))", "", "must not look at later ones"),
    ("causal_attention", ".softmax(-1)", ".softmax(-2)", "sees only itself"),
    ("causal_attention", "keys - queries + 1", "1", "query i is frame 2 + i"),
    ("causal_attention", "torch.cat([past[0], k], -2)", "torch.cat([k, past[0]], -2)", "the past keys and values followed by the new"),
    ("causal_attention", ", (k, v)", "", "return two things"),
    ("velocity_target", "x0 - noise", "noise - x0", "the wrong way round"),
    ("velocity_target", "x0 - noise", "noise", "the noise itself"),
    ("noisy_windows", "context_noise / 1000", "0", "the context is clean"),
    ("noisy_windows", "    share[:, :, :c] = context_noise / 1000\n", "", "must not depend on the flow time"),
    ("noisy_windows", "(1 - share) * latents + share * noise", "latents.mul_(1 - share) + share * noise", "it changed the latents"),
    ("verdict", ">=", ">", "exactly at the threshold counts"),
    ("verdict", "above.int().argmax(1)", "(scores * above).argmax(1)", "earliest"),
    ("verdict", "ends[earliest] - 1", "ends[earliest]", "has last frame 8; you say 9"),
    ("verdict", " & (ends - 1 <= length[:, None])", "", "beyond frame"),
    ("advantages", ".masked_fill(alike, 0.0)", ".add(0.1)", "sum to 0"),
    ("advantages", "(deviation + 1e-6)).masked_fill(alike, 0.0)", "deviation)", "nan"),
    ("advantages", "groups.std(1, keepdim=True)", "groups.std(1, keepdim=True, correction=0)", "unbiased"),
    ("policy_loss", "torch.maximum", "torch.minimum", "no more"),
    ("policy_loss", "(losses * mask).sum(1) / mask.sum(1)", "(losses * mask).sum(1) / 5", "however long"),
    ("policy_loss", "(losses * mask)", "losses", "however long"),
    ("policy_loss", "1 + clip_high", "1 + clip_low", "1.28"),
]


@pytest.mark.parametrize("name, right, wrong, told", MISTAKES, ids=lambda value: value.strip()[:24] if isinstance(value, str) else None)
def test_mistakes_are_named(name, right, wrong, told, exercises):
    assert right in SOLUTIONS[name]
    names, said = exercises
    exec(SOLUTIONS[name].replace(right, wrong), names)
    said.clear()
    exec(CHECKS[name], names)
    assert len(said) == 1 and said[0].startswith("✗") and told in said[0], said


@pytest.fixture(scope="module")
def exercises():
    "The notebook's names before the loop, and what `check` has said."
    said = []
    names = run({}, LOOP)
    names["print"] = lambda text: said.append(text)
    return names, said


# what the parts make of a world model with random weights, of its dream, and of a group on the board
OUTCOME = """
generator, world_model = torch.Generator().manual_seed(0), small_world_model()
for parameter in world_model.parameters(): parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
with your_parts():
    loss = world_model.loss(*sample_windows(generator, 4), generator)
    dream = rollout(Pusher(), BoardDream(world_model, generator), starts(generator, 2), generator)[2]
seen, did, film = rollout(Pusher(), Board(), starts(generator, 64), generator)
success, finish = judged(film)
log_probs = log_probs_of(Pusher(), seen, did)
scores = use("advantages", success.float(), 8)
outcome = loss, dream, finish, scores, use("policy_loss", log_probs, log_probs - 0.1, scores, torch.arange(16) < finish[:, None])
"""


@pytest.fixture(scope="module")
def kits_outcome():
    names = run({}, TRAINING)
    exec(OUTCOME, names)
    assert 0 < names["success"].sum() < 64
    return names["outcome"]


@pytest.mark.parametrize("name", BLANKS)
def test_one_function_works_among_the_kits(name, kits_outcome):
    names = run({name: SOLUTIONS[name]}, TRAINING)
    assert set(names["mine"]) == {name} and names["parts"][name] is names["mine"][name]
    exec(OUTCOME, names)
    assert names["calls"][name] > 0
    for alone, kits in zip(names["outcome"], kits_outcome): torch.testing.assert_close(alone, kits, rtol=1e-3, atol=1e-3)


def test_the_loop_learns_with_the_students_parts():
    names = run(SOLUTIONS)
    assert set(names["mine"]) == set(names["calls"]) == set(BLANKS) and min(names["calls"].values()) > 0
    assert names["after"] > names["before"] + 0.25
    assert names["stdit_room"].modulate is names["kit"]["modulate"], "the kit was left with the student's parts in it"
