"""How a command line ends with an error: one message, no traceback."""

import pytest

from megatron_lite import errors
from megatron_lite.errors import ConfigError, exit_with


@pytest.mark.parametrize(
    ("rank", "local_rank", "delays", "speaker"), [(0, 0, 0, "run.py"), (8, 0, 1, "run.py, rank 8"), (9, 1, 2, "rank 9")]
)
def test_rank_0_speaks_first(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    rank: int,
    local_rank: int,
    delays: int,
    speaker: str,
) -> None:
    """The others wait for the launcher to end them, and speak if it does not."""
    slept: list[float] = []
    monkeypatch.setattr(errors.time, "sleep", slept.append)
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    with pytest.raises(SystemExit) as ended:
        exit_with("run.py", ConfigError("no"))
    assert ended.value.code == 1
    assert slept == [errors.SECONDS_TO_SPEAK * delays]
    assert capsys.readouterr().err.endswith(f"{speaker}: no\n")
