"""docs/python.md runs as one program, and commands can use the head that it saves."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import Dsu

DOCUMENT = Path(__file__).parents[2] / "docs" / "python.md"


@pytest.mark.slow
def test_the_snippets_run_and_save_a_head(dsu: Dsu, drawn: Path, tmp_path: Path) -> None:
    snippets = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), flags=re.S)
    assert len(snippets) > 3
    dsu("cache-features", drawn / "train", "--preset", "toy", "--features", "V", "--quiet")
    (tmp_path / "photo.png").write_bytes(next((drawn / "test" / "masks").iterdir()).read_bytes())
    program = tmp_path / "program.py"
    program.write_text(
        "\n".join(snippets)
        .replace("features/tiles/toy", "features/train/toy")
        .replace('train("tiles"', 'train("train"')
    )
    done = subprocess.run([sys.executable, program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = dsu("head", "info", "my-head").output
    assert "random" in said, "the head tells the truth about its encoders"
    held_out = dsu("predict", "--head", "my-head", "--out", "held").output
    assert len(list(Path("held").rglob("*.png"))) == 2, held_out
    dsu("predict", drawn / "test" / "images", "--head", "my-head", "--out", "masks")
    assert len(list(Path("masks").rglob("*.png"))) == 5
