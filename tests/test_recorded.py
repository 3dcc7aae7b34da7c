"""The rebuilding of the package into rooms changed no bit of what is computed."""

import json
from pathlib import Path

import pytest
from recorded import CONTROL, cases, record

RECORDED = json.loads((Path(__file__).parent / "recorded_runs.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def same_processor():
    """Whether TRL's own trainer comes out here as where the recording was made, to the last bit."""
    return record(cases()[CONTROL]) == RECORDED[CONTROL]


@pytest.mark.parametrize("name", [name for name in cases() if name != CONTROL])
def test_every_member_equals_the_recording(name, same_processor):
    now, then = record(cases()[name]), RECORDED[name]
    if same_processor:
        assert now == then
    for key, values in then.items():
        assert now[key] == [None if v is None else pytest.approx(v, rel=1e-4, abs=1e-5) for v in values], key
