"""A message names the place of a fault, never what a file holds that is none of ours: it may be a file of passwords."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_run import SmallRun

from deepfloyd_core.errors import DeepFloydError
from deepfloyd_core.index.scan import scan
from deepfloyd_core.preflight.load import load_run

SECRET = "s3cr3t"
PASSWD = f"root:x:0:0:{SECRET}:/root:/bin/bash\n{SECRET}:x:1:1:daemon:/usr/sbin:/usr/sbin/nologin\n"
TEXTS = {
    "accounts": PASSWD,
    "blanks": PASSWD.replace(":", " "),
    "dictionary": json.dumps({"type": "service_account", "private_key": SECRET, "auths": {"registry": {"auth": SECRET}}}),
    "list": json.dumps([SECRET, {"id": {"key": SECRET}, "token": SECRET}, {"id": "a", "parquet": {"key": SECRET}}]),
    "our keys": json.dumps(
        {"workspace": {"password": SECRET}, "seed": [[SECRET]], "stage1": [{"key": SECRET}], "hf_token": SECRET,
         "report_to": {"key": SECRET}, "model_family": {"key": SECRET}, "aws_secret_access_key": SECRET}
    ),
    "entries": json.dumps(
        [{"id": "a", "type": "aws", "aws_secret_access_key": [SECRET], "hf_token": SECRET, "dataset_type": {"a": SECRET}},
         {"id": "b", "aws_secret_access_key": {"key": SECRET}, "aws_session_token": SECRET, "disabled": {"key": SECRET}},
         {"id": "c", "crop": {"key": SECRET}, "instance_data_dir": {"key": SECRET}, "huggingface": {"key": SECRET}}]
    ),
    "half": f'{{"password": "{SECRET}", "other": "{SECRET}"',
    "settings": f"[default]\naws_secret_access_key = {SECRET}\n",
    "table": f'[default]\npassword = "{SECRET}"\nworkspace = {{key = "{SECRET}"}}\n',
    "script": f"export PASSWORD={SECRET}\nexport OTHER=$({SECRET})\n",
    "call": f"login {SECRET}\n",
    "default": f"A=${{B:-{SECRET}}}\n",
    "piped": f"A=b|{SECRET}\n",
    "home": f"A=~{SECRET}\n",
    "sum": f"A={SECRET}\nB=$((A / 2))\nC=$(({SECRET} / 0))\n",
    "arguments": f"MODEL_TYPE=lora\nPASSWORD={SECRET}\nTOKEN=a\n",
    "key file": f"-----BEGIN KEY-----\n{SECRET}(\n(?P<{SECRET}>\n(?P={SECRET})\n-----END KEY-----\n",
    "rows": f"id,caption\n1,{SECRET},{SECRET}\n",
    "header": f"{SECRET};{SECRET}\n1;2\n",
    "lines": f'{{"user": "{SECRET}"}}\n{{"user": {SECRET}}}\n',
    "bytes": f"{SECRET}\udcff".encode("utf-8", "surrogateescape").decode("latin-1"),
}  # fmt: skip


def _files(folder: Path, names: tuple[str, ...]) -> Iterator[Path]:
    for number, text in enumerate(TEXTS.values()):
        for name in names:
            path = folder / f"{number}" / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(text.encode("latin-1"))
            yield path


def _said(path: Path, *overrides: str) -> str:
    """What a user is told of a run with a file: its notes or its faults."""
    try:
        run = load_run(path, overrides)
        scan(run)
        return "\n".join(run.notes)
    except DeepFloydError as error:
        return str(error)


@pytest.mark.parametrize("name", ["x", "x.toml", "x.json", "config.env", "x.sh"])
def test_a_file_that_is_no_run_file(tmp_path: Path, name: str) -> None:
    for path in _files(tmp_path, (name,)):
        said = _said(path)
        assert SECRET not in said and str(path) in said, said


@pytest.mark.parametrize("name", ["x", "x.toml", "x.json"])
def test_a_file_that_is_no_data_file(small_run: SmallRun, name: str) -> None:
    for path in _files(small_run.folder, (name,)):
        said = _said(small_run.config, f"data_backend_config={path}")
        assert SECRET not in said and str(path) in said, said


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("x.txt", {"caption_filter_list": "{}"}),
        ("x.json", {"caption_filter_list": "{}"}),
        *[(f"x.{kind}", {"caption_strategy": kind.replace("tsv", "csv"), "parquet": {"path": "{}"}})
          for kind in ("csv", "tsv", "jsonl", "parquet")],
        ("x.csv", {"type": "csv", "caption_strategy": "csv", "csv_file": "{}", "csv_cache_dir": "kept"}),
    ],
)  # fmt: skip
def test_a_file_that_is_none_of_captions_or_filters(small_run: SmallRun, name: str, keys: dict[str, object]) -> None:
    data = small_run.folder / "data.json"
    (entry,) = json.loads(data.read_text())
    for path in _files(small_run.folder, (name,)):
        data.write_text(json.dumps([entry | keys]).replace("{}", str(path)))
        said = _said(small_run.config)
        assert SECRET not in said, f"{path.read_bytes()!r}: {said}"
