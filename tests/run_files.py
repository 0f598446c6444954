"""What must be the same in the directories of two trainings."""

import json


def assert_same_files(undisturbed, continued):
    """Weights and everything transformers reads are the same bytes; the log agrees in all but its timings."""
    names = sorted(p.name for p in undisturbed.iterdir() if p.is_file())
    assert "model.safetensors" in names
    assert sorted(p.name for p in continued.iterdir() if p.is_file()) == names
    for name in names:
        assert (continued / name).read_bytes() == (undisturbed / name).read_bytes(), name
    timings = {"tokens_per_second", "peak_memory_bytes"}
    logs = [
        [
            {k: v for k, v in json.loads(line).items() if k not in timings}
            for line in (directory / "train/log.jsonl").read_text().splitlines()
        ]
        for directory in (undisturbed, continued)
    ]
    assert logs[0] == logs[1]
