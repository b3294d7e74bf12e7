import csv

import pytest

from blip.data.formats.csv_rows import csv_records, csv_rows
from blip.data.formats.json_rows import read_rows
from blip.data.settings import SourceConfig
from blip.data.stream import CaptionShards
from blip.errors import DataError
from capfilt.calibrate.audit import read_labels
from eval.nlvr import read_results
from eval.references import read_references

GOOD = {
    "plain": ("image,caption\n1.jpg,a\n2.jpg,b\n", [("1.jpg", "a"), ("2.jpg", "b")]),
    "no line end": ("image,caption\n1.jpg,a", [("1.jpg", "a")]),
    "windows": ("image,caption\r\n1.jpg,a\r\n2.jpg,b\r\n", [("1.jpg", "a"), ("2.jpg", "b")]),
    "old mac": ("image,caption\r1.jpg,a\r2.jpg,b\r", [("1.jpg", "a"), ("2.jpg", "b")]),
    "byte order mark": ("\ufeffimage,caption\n1.jpg,a\n", [("1.jpg", "a")]),
    "blank lines": ("\n\nimage,caption\n1.jpg,a\n\n2.jpg,b\n\n\n", [("1.jpg", "a"), ("2.jpg", "b")]),
    "commas and marks in quotes": ('image,caption\n1.jpg,"a, ""b"", c"\n', [("1.jpg", 'a, "b", c')]),
    "lines in quotes": ('image,caption\n1.jpg,"a\nb, c\n\nd"\n2.jpg,e\n', [("1.jpg", "a\nb, c\n\nd"), ("2.jpg", "e")]),
    "a mark in an unquoted field": ('image,caption\n1.jpg,a 5" pipe\n', [("1.jpg", 'a 5" pipe')]),
    "empty fields": ('image,caption\n1.jpg,\n2.jpg,""\n', [("1.jpg", ""), ("2.jpg", "")]),
    "tabs": ("image\tcaption\n1.jpg\ta, b; c\n", [("1.jpg", "a, b; c")]),
    "semicolons": ("image;caption\n1.jpg;a, b\n", [("1.jpg", "a, b")]),
    "spaces in the header": ("image, caption\n1.jpg,a\n", [("1.jpg", "a")]),
    "a column of row numbers": (",image,caption\n0,1.jpg,a\n", [("1.jpg", "a")]),
    "columns without a name": ("image,caption,,\n1.jpg,a,,\n", [("1.jpg", "a")]),
    "a long field": ("image,caption\n1.jpg," + "x" * 200_000 + "\n", [("1.jpg", "x" * 200_000)]),
}


@pytest.mark.parametrize("case", GOOD)
@pytest.mark.parametrize("name", ["a.csv", "A.CSV", "a.tsv"])
def test_files_that_can_be_read(tmp_path, case, name):
    content, expected = GOOD[case]
    (tmp_path / name).write_text(content, encoding="utf-8", newline="")
    rows = [(row["image"], row["caption"]) for _, row in read_rows(tmp_path / name)]
    assert rows == expected


ROWS = "".join(f"{i}.jpg,a thing\n" for i in range(2, 8))
BAD = {
    "an unquoted comma": ("image,caption\n1.jpg,a\n2.jpg,b, c\n", "line 3 has 3 fields where the first line has 2"),
    "no comma": ("image,caption\n1.jpg,a\n2.jpg\n", "line 3 has 1 field where the first line has 2"),
    "after a field of several lines": ('image,caption\n1.jpg,"a\nb"\n2.jpg\n', "line 4 has 1 field"),
    "after blank lines": ("\n\nimage,caption\n\n1.jpg\n", "line 5 has 1 field"),
    "never closed": (f'image,caption\n1.jpg,"a\n{ROWS}', "line 2: a quotation mark is opened and never closed"),
    "closed by a quoted field": (f'image,caption\n1.jpg,"a\n{ROWS}8.jpg,"b"\n', "line 2: text follows a closing quo"),
    "closed by a stray mark": (f'image,caption\n1.jpg,"a\n{ROWS}8.jpg,b"\n', "line 2: a quotation .* up to line 9"),
    "closed in the next row": ('image,caption\n1.jpg,"a\n2.jpg,b"\n', "line 2: a quotation mark .* up to line 3"),
    "in the first column": ('caption,image\n"a,1.jpg\nb",2.jpg\n', "line 2: a quotation mark .* up to line 3"),
    "of numbered rows": ('id,caption\n1,"a\n2,b"\n', "line 2: a quotation mark .* up to line 3"),
    "in the header": ('image,"caption\n1.jpg,a\n', "line 1: a quotation mark is opened and never closed"),
    "text after a mark": ('image,caption\n1.jpg,"a"b\n', "line 2: text follows a closing quotation mark"),
    "marks behind a backslash": ('image,caption\n1.jpg,"a \\"b\\" c"\n', "line 2: text follows a closing"),
    "vertical bars": ("image|caption\n1.jpg|a\n", r"line 1: the fields are separated by vertical bars \(\|\)"),
    "zero bytes": ("image,caption\n1.jpg,a\n\0\0\0\0", "line 3 holds NUL characters"),
    "a column twice": ("image,caption,image\n1.jpg,a,2.jpg\n", "line 1: duplicate column 'image' in the header"),
    "a header without names": (",\n1.jpg,a\n", "line 1: the header names no column"),
    "empty": ("", "is empty; expected a header"),
    "only blank lines": ("\n\n", "is empty; expected a header"),
    "latin-1": ("image,caption\n1.jpg,a\n2.jpg,\xe9\n".encode("latin-1"), "line 3 is not UTF-8 text"),
    "utf-16": ("image,caption\n1.jpg,a\n".encode("utf-16"), "line 1 is not UTF-8 text"),
    "utf-16 without a mark": ("image,caption\n1.jpg,a\n".encode("utf-16-le"), "line 1 holds NUL characters"),
}


@pytest.mark.parametrize("case", BAD)
def test_files_of_which_rows_would_be_lost_are_refused(tmp_path, case):
    content, message = BAD[case]
    path = tmp_path / "a.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=rf"a\.csv.*{message}") as caught:
        list(csv_rows(path))
    assert "\n" not in str(caught.value)


def test_every_file_that_python_writes_is_read_as_it_was(tmp_path):
    fields = ["", "a", "a,b", 'a"b', '"', '""', "a\nb", "a\r\nb", "\t;|", " x ", "ü", "'"]
    rows = [[a, b] for a in fields for b in fields if a or b]
    for separator in ",\t;":
        with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, delimiter=separator).writerows([["one", "two"], *rows])
        assert [row for _, row in csv_records(tmp_path / "a.csv")] == [["one", "two"], *rows]


def test_a_later_file_of_a_stream_is_looked_at_before_anything_is_read(tmp_path):
    (tmp_path / "0.csv").write_text("image,caption\n1.jpg,a\n")
    (tmp_path / "1.csv").write_text('image,caption\n1.jpg,"a\n2.jpg,b\n')
    with pytest.raises(DataError, match=r"1\.csv: line 2: a quotation mark is opened and never closed"):
        CaptionShards(SourceConfig(str(tmp_path / "*.csv")))


@pytest.mark.parametrize("read", [read_references, read_results, read_labels])
def test_evaluation_and_labels_are_as_strict(tmp_path, read):
    header = {read_results: "x,True\n", read_labels: "id,match\n"}.get(read, "image,caption\n")
    (tmp_path / "a.csv").write_text(header + '"x,True\n' + header)
    with pytest.raises(DataError, match=r"a\.csv: line 2: a quotation mark is opened and never closed"):
        read(tmp_path / "a.csv")
