"""What files and their decoders say reaches no terminal as it is: no control characters, no warnings of libraries."""

import io
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from data_world import DataWorld
from PIL import Image
from rich.table import Table
from small_run import SmallRun

from flows.commands import cli
from tasks.terminal import console, print_table

NASTY = "a\x1b[2J\x1b]0;title\x07b\x9bc\rd\x7f\u202ee"


def test_control_characters_of_a_file_are_written_out(
    small_run: SmallRun, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """An unknown key with an escape sequence, by the console script's own entry."""
    file = small_run.folder / "x.toml"
    file.write_text('"a\\u001b[2J\\u009b\\u202e" = 1\n')
    monkeypatch.setattr(sys, "argv", ["deepfloyd", "plan", str(file)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    said = capfd.readouterr()
    assert end.value.code == 2 and "a\\u001b[2j\\u009b\\u202e is not a known key" in said.err
    assert not set("\x1b\x9b\u202e") & set(said.out + said.err)


def test_texts_and_tables_hide_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    out = console()
    out.print(NASTY)
    table = Table("column")
    table.add_row(NASTY)
    print_table(out, table)
    printed = capsys.readouterr().out
    assert printed.count("a\\u001b[2J\\u001b") == 2
    assert not any(ord(sign) < 32 and sign != "\n" for sign in printed) and "\x9b" not in printed
    out.print("tab\tand\nline, Füchse \U0001f98a")
    assert "line, Füchse \U0001f98a" in capsys.readouterr().out


def test_decoders_write_nothing_to_the_terminal(world: DataWorld) -> None:
    """Pillow warns of a damaged EXIF, libtiff writes what it thinks of a strip to the standard error."""
    buffer = io.BytesIO()
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 80, 3), dtype=np.uint8))
    noise.save(buffer, "TIFF", compression="tiff_lzw")
    data = bytearray(buffer.getvalue())
    data[8:40] = b"\xff" * 32
    world.add("a.tif", bytes(data))
    exif = b"Exif\0\0II*\0" + struct.pack("<IHHHI", 8, 5, 0x112, 3, 255) + b"\1"
    noise.save(world.folder / "pictures" / "b.jpg", exif=exif)
    script = (
        "import sys; sys.path.insert(0, sys.argv[2]); from pathlib import Path; from data_world import DataWorld\n"
        "from deepfloyd_core.processes.pool import Children, Limits\n"
        "with Children(1, Limits(), ('deepfloyd_core.index.index',)) as children:\n"
        "    world = DataWorld(Path(sys.argv[1]), children)\n"
        "    print(world.index(world.load({'caption_strategy': 'filename'}, stages=(1,), max_rejected_share=1.0)))\n"
    )
    support = str(Path(__file__).parents[1] / "support")
    command = [sys.executable, "-P", "-c", script, str(world.folder), support]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0 and done.stderr == "", done.stderr
