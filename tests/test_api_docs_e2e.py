"""The session in docs/api.md works as it is written."""

import re
import subprocess
from pathlib import Path

from .conftest import LIMIT
from .managing import managed

ROOT = Path(__file__).parent.parent


def test_the_documented_session(tmp_path: Path) -> None:
    session = re.search(r"```sh\n(.*?)```", (ROOT / "docs" / "api.md").read_text(), re.DOTALL)
    assert session
    with managed(tmp_path, plugins=ROOT / "plugins") as manager:
        script = session[1].replace(":8000", f":{manager.host.port}")
        done = subprocess.run(
            ["bash", "-euxo", "pipefail", "-c", script],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=LIMIT,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert '"toleranceSeconds":60' in done.stdout
        assert "sk_test_123" not in done.stdout
        assert '"action":"install.put"' in done.stdout
