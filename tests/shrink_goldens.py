"""Make the copy of the golden tensors that lies in the repository: `python tests/shrink_goldens.py FULL_FOLDER tests/goldens`.

The full set is 15 MB. This copy keeps every kind of check and every weight, and leaves out what repeats one: further members of
a batch, further cases, inner steps. Whoever has the full set checks all of it: `WMPO_GOLDENS=FULL_FOLDER pytest tests/test_parity_*.py`."""
import json
import re
import sys
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file

# file: patterns of whole names that are left out
LEFT_OUT = {
    "actions_and_logprobs": [r"lp\.update.*traj[1-9].*"],
    "grpo": [r"prime\..*", r"up\.one_minibatch\..*"],
    "policy_image_preprocess": [r"\w+\.[1-9](\..*)?"],
    "rectified_flow": [r"sa\..*\.v", r"ss\..*\.(z_in|v|x_mask)", r"sa\.n7_tt256\..*"],
    "sdxl_vae_wrapper_tiny": [r"out\.dec_mbNone"],
    "world_model_stdit_tiny": [r"mid\.train\..*", r"mid\..*\.(spatial_.*|temporal_1)"],
}
# file: (pattern of whole names, what is kept of them)
KEPT = {
    "actions_and_logprobs": [(r"lp\.logits", (slice(6), ..., slice(-320, None))),       # two trajectories of three chunks
                             (r"lp\.(responses|finish_step|T.*)", slice(2)),
                             (r"sample\.T1\.6\.probs256", (slice(1), slice(7))),
                             (r"(greedy|sample)\..*normalized_actions_f64", slice(8)), (r"(greedy|sample)\..*", slice(1))],
    "grpo": [(r"up\.logits", (slice(8), ..., slice(-320, None))), (r"up\.(responses|finish_step|advantages|old_log_probs)", slice(2)),
             (r"up\.two_minibatches\.grad_logits_cols", (slice(1), slice(1), ..., slice(-320, None)))],
    "openvla_oft_policy_tiny": [(r"out\.generate\.\w+\.normalized_actions_f64", slice(8, 16)),
                                (r"(in|mid|out|contrast)\..*", slice(1, 2))],   # the second one: its prompt is padded
    "sdxl_vae_wrapper_tiny": [(r"(in|out)\..*", slice(1)), (r"enc\..*", slice(5))],                # five frames each
    "videomae_classifier_tiny": [(r"\w+\.(in|mid|out)\..*", slice(1))],
    "videomae_preprocess": [(r"in\..*", slice(2)), (r".*", (slice(None), slice(2)))],                   # two frames of eight
    "world_model_stdit_tiny": [(r"(in|out)\.(infer|mixedmask)(\..*)?", slice(1))],
}


def trim(file: str, name: str, tensor):
    "What is kept of one tensor."
    kept = next((part for pattern, part in KEPT.get(file, []) if re.fullmatch(pattern, name)), ...)
    return tensor[kept].contiguous()


def trim_record(file: str, record: dict, tensors: dict) -> dict:
    "The description that goes with the tensors that are left."
    # a weight's shape is in its own file
    listed = {name: entry for name, entry in record.get("tensors", {}).items() if name in tensors and "state_dict." not in name}
    if "tensors" in record: record["tensors"] = listed
    for name, entry in listed.items():
        if "shape" in entry: entry["shape"] = list(tensors[name].shape)
    if file == "rectified_flow": del record["sampling"]["sa.n7_tt256"]
    if file == "grpo":
        del record["up_one_minibatch"]
        update = record["up_two_minibatches"]                                   # the first mini-batch: two trajectories
        update["grad_l2_all_rows"] = update["grad_l2_all_rows"][:1]
        for name, values in update["metrics"].items(): update["metrics"][name] = values[:len(values) // 2]
    return record


def shrink(full: Path, folder: Path):
    "Write the small copy of every golden of `full` to `folder`."
    folder.mkdir(parents=True, exist_ok=True)
    for source in sorted(full.glob("*.json")):
        record, weights = json.loads(source.read_text()), source.with_suffix(".safetensors")
        if weights.exists():
            left_out = LEFT_OUT.get(source.stem, [])
            tensors = {name: trim(source.stem, name, tensor) for name, tensor in load_file(weights).items()
                       if not any(re.fullmatch(pattern, name) for pattern in left_out)}
            with safe_open(weights, "pt") as file: save_file(tensors, folder / weights.name, file.metadata())
            record = trim_record(source.stem, record, tensors)
        (folder / source.name).write_text(json.dumps(record, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 3: sys.exit(__doc__)
    shrink(*map(Path, sys.argv[1:]))
