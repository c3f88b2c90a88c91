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


def test_only_a_table_of_the_same_stem_is_left_out_and_descriptions_are_not_rows(tmp_path):
    (tmp_path / "one.jsonl").write_text('{"text": "json"}\n')
    (tmp_path / "one.csv").write_text("text\njson\n")
    (tmp_path / "two.csv").write_text("text\ntable\n")
    (tmp_path / "dataset_infos.json").write_text('{"text": "a description"}')
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "one.csv").write_text("text\ndeep\n")
    assert [example.text for example in read(tmp_path).examples] == ["deep", "json", "table"]


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("rows.csv.gz", "is a compressed CSV file\nhint: unpack it"),
        ("rows.TSV.zst", "is a compressed TSV file\nhint: unpack it"),
        ("rows.tar.gz", "is a TAR archive\nhint: unpack it and name its folder"),
        ("rows.xlsx.zip", "is a XLSX file\nhint: write it as JSONL"),
    ],
)
def test_what_is_unread_is_named_whatever_compresses_it(tmp_path, name, match):
    (tmp_path / name).write_bytes(gzip.compress(b"text\nhello\n"))
    with pytest.raises(DataError, match=match):
        read(tmp_path / name)


def test_parquet_does_not_add_null_arguments(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    def turns(name: str, arguments: dict) -> list:
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        return [
            {"role": "user", "content": "u", "tool_calls": None},
            {"role": "assistant", "content": None, "tool_calls": [call]},
        ]

    rows = [turns("weather", {"city": "Rome"}), turns("add", {"a": 1, "b": 2})]
    kind = pyarrow.map_(pyarrow.string(), pyarrow.struct([("x", pyarrow.int64()), ("y", pyarrow.int64())]))
    pairs = pyarrow.array([[("k", {"x": 1})], [("k", {"y": 2})]], kind)
    parquet.write_table(pyarrow.table({"messages": rows, "pairs": pairs}), tmp_path / "rows.parquet")
    first, second = read(tmp_path / "rows.parquet").examples
    calls = [example.conversation.messages[1].calls[0].arguments for example in (first, second)]
    assert calls == [{"city": "Rome"}, {"a": 1, "b": 2}]
    assert (first.metadata, second.metadata) == ({"pairs": [["k", {"x": 1}]]}, {"pairs": [["k", {"y": 2}]]})


def test_parquet_text_that_is_not_utf_8_is_named(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    data = [None, pyarrow.array([0, 2, 4], pyarrow.int32()).buffers()[1], pyarrow.py_buffer(b"ok\xff\xfe")]
    texts = pyarrow.Array.from_buffers(pyarrow.string(), 2, data)
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match="after row 0 is not UTF-8") as caught:
        read(tmp_path / "rows.parquet")
    assert caught.value.where == str(tmp_path / "rows.parquet")


def test_a_label_of_true_or_false_in_a_table_of_texts_is_a_verdict(tmp_path):
    (tmp_path / "rows.csv").write_text("text,label\na,true\nb,False\nc,\nd,1\n")
    result = read(tmp_path / "rows.csv")
    assert [example.label for example in result.examples] == [True, False, None]
    assert [row.reason for row in result.dropped] == ["label"]


@pytest.mark.parametrize("name", ["book.txt", "Book.TXT", "notes.md", "book.txt.gz"])
def test_a_book_is_refused_once_with_how_rows_are_written(tmp_path, name):
    path = tmp_path / name
    text = b"\n\nIt was a cold day.\n\nNobody spoke.\n"
    path.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    with pytest.raises(DataError, match="is plain text, not rows") as caught:
        list(sources.raws(path))
    assert '{"text": "…"}' in str(caught.value)


@pytest.mark.parametrize("text", ['{"text": "a"}\n', '[{"text": "a"}]'])
def test_rows_in_a_text_file_are_rows(tmp_path, text):
    (tmp_path / "rows.txt").write_text(text)
    assert [raw.text for raw in sources.raws(tmp_path / "rows.txt")] == ['{"text": "a"}']


def test_a_table_in_an_archive_is_refused_once(tmp_path):
    with zipfile.ZipFile(tmp_path / "rows.zip", "w") as archive:
        archive.writestr("rows.csv", "text\nthe cat\n")
    with pytest.raises(DataError, match=r"holds a table \(rows.csv\)"):
        list(sources.raws(tmp_path / "rows.zip"))


def test_the_place_of_a_fault_in_json_is_named_once(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "the cat\n')
    (bad,) = read(tmp_path / "rows.jsonl").dropped
    assert "broken JSON, unterminated string starting at column 10: " in bad.message
