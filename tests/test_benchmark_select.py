"""What benchmarks.select writes: after every layer, and not as if it were all."""

import json
from pathlib import Path

import pytest

from benchmarks import select
from benchmarks.result_file import ResultFile
from benchmarks.tables import select_times


def test_a_run_that_is_stopped_keeps_its_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def times(_images: int, features: int, _side: int, *, rounds: int) -> object:
        if features == 192:
            raise KeyboardInterrupt
        slow = {"eager": 4.0, "compiled": 3.0, "fused": 1.0}
        return {way: ([ms / 4e3] * rounds, [ms / 1e3] * rounds) for way, ms in slow.items()}

    monkeypatch.setattr(select, "times", times)
    file = ResultFile(tmp_path / "select.json", {}, "layers")
    with pytest.raises(KeyboardInterrupt):
        select.measure(file, images=2, rounds=3, peak=3e12)
    result = json.loads((tmp_path / "select.json").read_text(encoding="utf-8"))
    assert result["cut"] == {"measured": 4, "of": 8, "what": "layers"}
    assert len(result["results"]) == 12
    assert result["results"][2] == {
        "network": "R50 1x SK",
        "features": 64,
        "side": 56,
        "way": "fused",
        "median_forward_ms": 0.25,
        "median_ms": 1.0,
        "min_ms": 1.0,
        "gigabytes_per_second": 12.0,
        "forward_share_of_copy": 0.007,
        "share_of_copy": 0.004,
        "time_over_eager": 0.25,
    }
    assert select_times(result) == {}
