"""Compressed files and tables give the rows that the plain file gives; damaged ones are named."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import sys
import zipfile
from pathlib import Path

import pytest

from tunesmith.data import formats, sources
from tunesmith.data.formats import DataSpec
from tunesmith.errors import DataError, SetupError

ROWS = [{"prompt": f'say "{n}", é', "completion": f"line\n{n}"} for n in range(700)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def read(path: Path):
    return formats.read([path], DataSpec(train="x"))


def same(path: Path) -> bool:
    result = read(path)
    pairs = [{"prompt": row.prompt, "completion": row.completion} for row in result.examples]
    return pairs == ROWS and result.dropped == []


def zstd(data: bytes) -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    return pyarrow.compress(data, codec="zstd", asbytes=True)


@pytest.fixture
def packers() -> dict:
    return {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstd}


@pytest.mark.parametrize("ending", ["gz", "bz2", "xz", "zst"])
def test_a_compressed_file_is_read_whatever_its_name(tmp_path, packers, ending):
    packed = packers[ending](LINES)
    for name in (f"rows.jsonl.{ending}", "rows.jsonl"):
        (tmp_path / name).write_bytes(packed)
        assert same(tmp_path / name)
    (tmp_path / "array.json").write_bytes(packers[ending](json.dumps(ROWS).encode()))
    assert same(tmp_path / "array.json")


@pytest.mark.parametrize("ending", ["gz", "bz2", "xz", "zst"])
def test_a_torn_compressed_file_is_named(tmp_path, packers, ending):
    path = tmp_path / f"rows.jsonl.{ending}"
    packed = packers[ending](LINES)
    path.write_bytes(packed[: len(packed) // 2])
    with pytest.raises(DataError, match="is damaged") as caught:
        read(path)
    assert caught.value.where == str(path)


def test_a_zip_archive_of_one_file_is_read_and_others_are_told(tmp_path):
    path = tmp_path / "rows.jsonl.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("rows.jsonl", LINES)
    assert same(path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("more.jsonl", LINES)
    with pytest.raises(DataError, match="a zip archive of 2 files"):
        read(path)


@pytest.mark.parametrize("delimiter", [",", "\t"])
def test_a_table_with_names_in_its_first_line(tmp_path, delimiter):
    path = tmp_path / ("rows.csv" if delimiter == "," else "rows.tsv")
    with path.open("w", encoding="utf-8-sig", newline="") as stream:
        writer = csv.writer(stream, delimiter=delimiter)
        writer.writerow(["prompt", "completion"])
        writer.writerows([row["prompt"], row["completion"]] for row in ROWS)
    assert same(path)
    assert [raw.source for raw in sources.raws(path)][:3] == [f"{path}:{line}" for line in (2, 4, 6)]


def test_empty_cells_are_null_and_cells_hold_messages_and_verdicts(tmp_path):
    turns = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    with (tmp_path / "rows.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["messages", "label"], [repr(turns), "1"], [json.dumps(turns), ""]])
    judged, shown = read(tmp_path / "rows.csv").examples
    assert judged.desirable is True and judged.conversation == shown.conversation


@pytest.mark.parametrize(
    ("text", "line"), [("a,a\n1,2\n", 1), ("a,\n1,2\n", 1), ("a,b\n1,2\n1,2,3\n", 3), ('a,b\n1,"2\n', 2)]
)
def test_a_broken_table_is_refused_at_its_line(tmp_path, text, line):
    (tmp_path / "rows.csv").write_text(text)
    with pytest.raises(DataError) as caught:
        read(tmp_path / "rows.csv")
    assert caught.value.where == f"{tmp_path / 'rows.csv'}:{line}"


def test_a_parquet_file(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    turns = [
        [{"role": "user", "content": "u"}, {"role": "assistant", "content": f"a{n}"}] for n in range(600)
    ]
    table = pyarrow.table({"messages": turns, "score": [float("nan")] * 600, "raw": [b"\x00"] * 600})
    parquet.write_table(table, tmp_path / "rows.parquet")
    result = read(tmp_path / "rows.parquet")
    assert [example.conversation.messages[1].content for example in result.examples] == [
        f"a{n}" for n in range(600)
    ]
    assert result.examples[0].metadata == {"score": None, "raw": "1 bytes"}
    (tmp_path / "torn.parquet").write_bytes((tmp_path / "rows.parquet").read_bytes()[:-9])
    with pytest.raises(DataError, match="the Parquet file is damaged"):
        read(tmp_path / "torn.parquet")


def test_without_the_package_it_is_told_once_what_to_install(tmp_path, monkeypatch):
    packed = zstd(LINES)
    (tmp_path / "rows.jsonl.zst").write_bytes(packed)
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for name in ("rows.jsonl.zst", "rows.parquet"):
        with pytest.raises(SetupError, match=r"tunesmith\[tables\]"):
            read(tmp_path / name)


def test_tables_beside_json_in_a_folder_are_not_read_twice(tmp_path):
    (tmp_path / "rows.csv").write_text("text\nhello\n")
    assert [example.text for example in read(tmp_path).examples] == ["hello"]
    (tmp_path / "rows.jsonl").write_text('{"text": "hello"}\n')
    assert read(tmp_path).rows == 1
