"""What ends a command, and with which exit code."""

import pytest
from ray.exceptions import RayActorError

from tac_ray.cli import _plainly


def fail(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ValueError("n_images=40 should be >= n_clusters=50"), 2, "error: n_images=40 should be"),
        (RayActorError(error_msg="The actor died.\nIts log: ..."), 1, "memory: The actor died.; "),
    ],
)
def test_what_a_person_can_mend_is_said_in_one_line(
    error: Exception, code: int, said: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as exit:
        _plainly(lambda: fail(error), verbose=False)
    assert exit.value.code == code
    assert said in capsys.readouterr().err
    with pytest.raises(type(error)):
        _plainly(lambda: fail(error), verbose=True)
