"""Tar shards whole, joined, torn, zeroed and hostile, read by training and by CapFilt through one function."""

import contextlib
import io
import random
import subprocess
import tarfile

import pytest

from blip.data.formats.sources import open_source
from blip.data.formats.tars import read_headers, read_member
from blip.data.settings import SourceConfig
from blip.data.stream import CaptionShards
from blip.errors import BadSample, DataError
from capfilt.__main__ import main
from capfilt.reading import index_tar

JPEG = b"\xff\xd8 not looked at \xff\xd9"


def block(name, size=0, kind=b"0"):
    """A ustar header by the standard's table of fields."""
    head = name.encode().ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + b"%011o\0" % size + b"%011o\0" % 0
    head += b" " * 8 + kind + b"\0" * 100 + b"ustar\x0000"
    head = head.ljust(512, b"\0")
    return head[:148] + b"%06o\0 " % sum(head) + head[156:]


def member(name, content=b"", kind=b"0"):
    return block(name, len(content), kind) + content + b"\0" * (-len(content) % 512)


def pax(records, kind=b"x"):
    content = b""
    for keyword, value in records.items():
        bare = len(keyword) + len(value) + 3
        length = next(n for n in range(bare, bare + 9) if n == bare + len(str(n)))
        content += b"%d %s=%s\n" % (length, keyword.encode(), value)
    return member("pax", content, kind)


def pair(key, image=JPEG, text=b"text"):
    return member(f"{key}.jpg", image) + member(f"{key}.txt", text)


def archive(*members, record=10240):
    content = b"".join(members) + b"\0" * 1024
    return content + b"\0" * (-len(content) % record)


def read(content):
    return read_headers(io.BytesIO(content), "s.tar")


def keys(content):
    return [sample.key for sample in read(content).samples]


@pytest.fixture
def shard(tmp_path):
    def write(content):
        path = tmp_path / "s.tar"
        path.write_bytes(content)
        return path

    return write


def readers(path, **options):
    """The rows that training, streaming and CapFilt see of a shard."""
    config = SourceConfig(str(path), **options)
    streamed = CaptionShards(config)
    return len(open_source(config)), len(list(streamed.read(path))), index_tar(str(path))[0].num_rows


# Joined archives ------------------------------------------------------------------------------------------------------


JOINED = {
    "records": ([archive(pair("a"), pair("b")), archive(pair("c"))], ["a", "b", "c"]),
    "two blocks": ([archive(pair("a"), record=512), archive(pair("b"), record=512)], ["a", "b"]),
    "larger records": ([archive(pair("a"), record=1 << 18), archive(pair("b"))], ["a", "b"]),
    "zeros between": ([archive(pair("a")), b"\0" * 30 * 512, archive(pair("b"))], ["a", "b"]),
    "three": ([archive(pair("a")), archive(pair("b"), record=512), archive(pair("c"))], ["a", "b", "c"]),
    "an empty one": ([archive(pair("a")), archive(), archive(pair("b"))], ["a", "b"]),
    "an empty one first": ([archive(), archive(pair("a"))], ["a"]),
    "one name": ([archive(pair("a")), archive(pair("a")), archive(pair("a"))], ["a", "a#2", "a#3"]),
    "a sample in two": ([archive(member("a.jpg", JPEG)), archive(member("a.txt", b"x"))], ["a"]),
}


@pytest.mark.parametrize("case", JOINED)
def test_joined_archives_are_read_whole(case, shard):
    parts, expected = JOINED[case]
    headers = read(b"".join(parts))
    assert [sample.key for sample in headers.samples] == expected
    assert headers.damage is None
    assert headers.twice == ["a"] * (case == "one name")
    assert "archives are joined in it" in headers.notes[0]
    assert readers(shard(b"".join(parts))) == (len(expected),) * 3


def test_archives_of_tar_itself_can_be_joined(tmp_path):
    """Against GNU tar: what it lists of the joined file with --ignore-zeros."""
    for name in ("a", "b"):
        for suffix in ("jpg", "txt"):
            (tmp_path / f"{name}.{suffix}").write_bytes(name.encode() * 700)
        subprocess.run(["tar", "-cf", f"{name}.tar", f"{name}.jpg", f"{name}.txt"], cwd=tmp_path, check=True)
    content = (tmp_path / "a.tar").read_bytes() + (tmp_path / "b.tar").read_bytes()
    (tmp_path / "both.tar").write_bytes(content)
    listed = subprocess.run(["tar", "-tif", "both.tar"], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert sorted({name[0] for name in listed.stdout.split()}) == keys(content) == ["a", "b"]
    assert read_member(tmp_path / "both.tar", read(content).samples[1].image) == b"b" * 700


def test_global_headers_end_with_their_archive():
    first = archive(pax({"path": b"x.jpg", "comment": b"c"}, b"g"), member("a.jpg", JPEG))
    assert keys(first + archive(member("b.jpg", JPEG))) == ["x", "b"]


# Damage ---------------------------------------------------------------------------------------------------------------


def plan(path, *options):
    """The exit status of CapFilt's plan of a shard."""
    return main(["plan", "--input", str(path), "--out", str(path.parent / "run"), "--scorer", "fake", *options])


WHOLE = archive(pair("a"), pair("b"), pair("c"))  # headers at 0, 1024, 2048, ...; the end marker from 6144
AFTER = {
    "text": (
        WHOLE + b"an appended note",
        "zeros from byte 6,144 to 10,240, followed by bytes that are not a tar header",
    ),
    "a compressed archive": (
        WHOLE + b"\x1f\x8b\x08" + b"x" * 900,
        "10,240, followed by bytes that are not a tar header",
    ),
    "in the padding": (WHOLE[:8192] + b"x" * 512 + WHOLE[8704:], "8,192, followed by bytes that are not a tar header"),
    "within a block": (WHOLE[:-1] + b"x", "zeros from byte 6,144 to 9,728, followed by bytes"),
    "without a marker": (WHOLE[:6144] + b"x" * 512, "the bytes at 6,144 are not a tar header"),
    "no marker": (WHOLE[:6144], "ends at byte 6,144 without an end marker"),
    "a torn archive": (WHOLE + WHOLE[:1600], "ends at byte 11,840"),
    "half filled": (WHOLE[:6144] + b"\0" * (2 << 20), "more than 1 MiB of zeros from byte 6,144 on"),
    "zeros between": (WHOLE + b"\0" * (1 << 20) + WHOLE, "more than 1 MiB of zeros from byte 6,144 on"),
}


@pytest.mark.parametrize("case", AFTER)
def test_what_follows_the_end_is_padding_an_archive_or_damage(case, shard):
    content, damage = AFTER[case]
    count = 4 if case == "a torn archive" else 3
    headers = read(content)
    assert damage in headers.damage
    assert len(headers.samples) == count
    path = shard(content)
    with pytest.raises(DataError, match=rf"s\.tar is not a whole tar file \(.*byte.*\) after {count} samples"):
        open_source(SourceConfig(str(path)))
    assert readers(path, allow_truncated=True) == (count,) * 3
    assert (plan(path), plan(path, "--allow-damaged")) == (2, 0)


@pytest.mark.parametrize(
    ("zeros", "note"), [(512, False), (1024, False), (4096, False), (4608, True), (700, False), (1 << 20, True)]
)
def test_zeros_up_to_a_mebibyte_are_padding(zeros, note):
    """From byte 6,144 on: to 10,240 they are what tar writes, up to 1 MiB they are said."""
    headers = read(WHOLE[:6144] + b"\0" * zeros)
    assert (len(headers.samples), headers.damage) == (3, None)
    assert any(f"{zeros:,} bytes of zeros follow" in line for line in headers.notes) == note
    assert "more than 1 MiB" in read(WHOLE[:6144] + b"\0" * ((1 << 20) + 1)).damage


def test_a_download_that_stopped_within_a_member_is_seen_however_small_it_is():
    """71,680 bytes, of which the first 1,600 have arrived: the second member is of bytes 1,536 to 3,536."""
    whole = archive(member("a.jpg", b"x" * 512), member("b.jpg", b"x" * 2000), *(pair(f"{i:03}") for i in range(30)))
    headers = read(whole[:1600].ljust(len(whole), b"\0"))
    assert "zeros from byte 3,584 to 71,680, which begin inside the last member" in headers.damage
    black = archive(pair("a"), member("b.bmp", bytes(2000)))  # ends in zeros, and that is what it is
    assert read(black + bytes(10240)).damage is None
    assert "before any member" in read(b"\0" * 40960).damage
    assert read(b"\0" * 10240) == read(archive())


SIZES = (0, 1, 511, 512, 513, 5000)


@pytest.mark.parametrize("seed", range(20))
def test_a_zeroed_header_is_seen_wherever_it_stands(seed):
    """Twenty archives, each header of each; contents are of no zeros, as a block of zeros may be one of a content."""
    rng = random.Random(seed)
    content, headers = b"", []  # where headers are, and how many members are before
    for i in range(20):
        kind, name = rng.choice(("plain", "plain", "pax", "long")), f"{i:02}.jpg"
        if kind != "plain":
            headers.append((len(content), i))
            own = pax({"path": name.encode()}) if kind == "pax" else member("././@LongLink", name.encode(), b"L")
            content += own
        headers.append((len(content), i))
        # The last is not empty: an empty member's header, when zeroed, is one more block of zeros before the end.
        size = rng.choice((0, 1, 511, 512, 513, 5000)) or i == 19
        content += member(name if kind == "plain" else "short", bytes(rng.randrange(1, 256) for _ in range(size)))
    content, names = archive(content), [f"{i:02}" for i in range(20)]
    assert keys(content) == names
    for at, before in headers:
        damaged = read(content[:at] + b"\0" * 512 + content[at + 512 :])
        assert "zeros" in damaged.damage
        assert [sample.key for sample in damaged.samples] == names[:before]


def test_several_zeroed_headers_are_seen():
    content = bytearray(WHOLE)
    for at in (1024, 2048, 4096):
        content[at : at + 512] = bytes(512)
    assert keys(bytes(content)) == ["a"]
    assert read(bytes(content)).damage == "zeros from byte 1,024 to 1,536, followed by bytes that are not a tar header"


def test_a_zeroed_header_of_an_empty_member_is_seen():
    content = bytearray(archive(pair("a"), member("b.txt"), pair("c")))
    content[2048:2560] = bytes(512)
    assert "zeros from byte 2,048 to 2,560 stand where a header belongs" in read(bytes(content)).damage


@pytest.mark.parametrize("how", ["zeroed", "random"])
def test_each_block_spoiled_in_turn(how):
    """Three samples, one with an extended header: nothing is lost without a word, nothing raises."""
    content, rng = (
        archive(pair("a"), pax({"path": b"b.jpg"}), member("x", JPEG), member("b.txt", b"b"), pair("c")),
        random.Random(7),
    )
    # Blocks: 0-3 a; 4-5 the extended header, 6-7 and 8-9 b; 10-13 c; 14-19 the end marker and its record.
    contents = {1, 3, 7, 9, 11, 13}
    before = dict.fromkeys(range(20), 3) | dict.fromkeys(range(10, 12), 2) | {0: 0, 2: 1, 4: 1, 5: 1, 6: 1, 8: 2, 12: 3}
    for number in range(20):
        spoiled = bytearray(content)
        spoiled[number * 512 : number * 512 + 512] = bytes(512) if how == "zeroed" else rng.randbytes(512)
        headers = read(bytes(spoiled))
        seen = number not in contents and not (how == "zeroed" and number >= 14)
        assert bool(headers.damage) == seen, number
        assert len(headers.samples) == (before[number] if seen else 3), number


def test_each_length_in_turn():
    """Cut at each block and within each: whole from the first block of the end marker on."""
    content = archive(pair("a"), pair("b"), pair("c"))
    for size in (*range(0, 10241, 512), *range(100, 10240, 512)):
        headers = read(content[:size])
        assert bool(headers.damage) == (size < 6144 + 512), size
        # A sample is known by its first header; both members are there 1,540 bytes on.
        assert len([s for s in headers.samples if s.whole]) == sum(size >= start + 1540 for start in (0, 2048, 4096)), (
            size
        )


def test_random_bytes_and_edits_are_damage_or_read():
    rng, content = random.Random(3), archive(pair("a"), pax({"path": b"b.jpg"}), member("x", JPEG), pair("c"))
    for _ in range(2000):
        spoiled = bytearray(content)
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(content))
            spoiled[at] = rng.randrange(256)
        with contextlib.suppress(DataError):
            read(bytes(spoiled))
        try:
            headers = read(rng.randbytes(rng.randrange(1, 3000)))
        except DataError:  # as if compressed
            continue
        assert headers.damage


# Extended headers -----------------------------------------------------------------------------------------------------

EXTENDED = {
    "a chain of x": pax({"comment": b"c"}) * 400,
    "a chain of g": pax({"comment": b"c"}, b"g") * 400,
    "a chain of L": member("././@LongLink", b"name\0", b"L") * 400,
    "a chain of K": member("././@LongLink", b"name\0", b"K") * 400,
    "a chain without content": block("pax", 0, b"x") * 129,
    "digits": member("pax", b"1" * 100_000, b"x"),
    "one large value": pax({"comment": b"c" * 70_000}),
    "a long name": member("././@LongLink", b"n" * 70_000, b"L"),
    "more than there is": block("pax", (1 << 33) - 1, b"x"),
}


@pytest.mark.parametrize("case", EXTENDED)
def test_extended_headers_beyond_64_kb_are_damage(case, shard):
    content = archive(pair("a"), EXTENDED[case], pair("b"))
    headers = read(content)
    assert "more than 64 KB of extended headers before one member, at byte 2,048" in headers.damage
    assert len(headers.samples) == 1
    with pytest.raises(DataError, match=r"s\.tar is not a whole tar file \(more than 64 KB"):
        open_source(SourceConfig(str(shard(content))))


def test_extended_headers_up_to_64_kb_are_read(monkeypatch):
    """Not by tarfile, which before CVE-2024-6232 was mended needs the square of these digits: a minute."""
    monkeypatch.setattr(tarfile.TarInfo, "_proc_member", None)
    assert keys(archive(pax({"comment": b"c"}) * 63, pax({"path": b"a.jpg"}), member("x", JPEG))) == ["a"]
    assert keys(archive(pax({"comment": b"1" * 60_000, "path": b"a.jpg"}), member("x", JPEG))) == ["a"]
    assert (
        "extended header at byte 512 is damaged" in read(archive(member("pax", b"1" * 60_000, b"x"), pair("a"))).damage
    )


DAMAGED = {
    "no length": b"path=a.jpg\n",
    "too long": b"99 path=a.jpg\n",
    "too short": b"9 path=a.jpg\n",
    "no equals sign": b"8 path \n",
    "no end of line": b"14 path=a.jpg ",
    "zero": b"0 path=a.jpg\n",
    "negative": b"-4 path=a.jpg\n",
    "a number of thousands of digits": b"9" * 5000 + b" path=a.jpg\n",
    "zeros": b"\0" * 30,
    "a negative size": b"11 size=-5\n",
    "no size": b"12 size=1_0\n",
    "a size beyond all": b"%d size=" % 5008 + b"9" * 4999 + b"\n",
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_extended_headers_are_damage(case):
    headers = read(archive(pair("a"), member("pax", DAMAGED[case], b"x"), member("b.jpg", JPEG)))
    assert len(headers.samples) == 1
    assert headers.damage


def test_names_and_sizes_are_those_that_tarfile_finds():
    """Against the standard library, for what its three formats write."""
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        long = "d" * 90 + "/" + "n" * (90 if form == tarfile.USTAR_FORMAT else 150)
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=form) as tar:
            for i, name in enumerate(["a.jpg", "d/b.v2.JPG", "sch\xf6n.png", f"{long}.gif", "c d.bmp"]):
                info = tarfile.TarInfo(name)
                info.size = i * 300
                tar.addfile(info, io.BytesIO(b"x" * info.size))
            info = tarfile.TarInfo("folder")
            info.type = tarfile.DIRTYPE
            tar.addfile(info)
        with tarfile.open(fileobj=io.BytesIO(file.getvalue())) as tar:
            members = [m for m in tar if m.isreg()]
        headers = read(file.getvalue())
        assert [s.image for s in headers.samples] == [(m.offset_data, m.size) for m in members]
        assert [s.key for s in headers.samples] == [m.name.rpartition(".")[0] for m in members]


def test_a_size_in_an_extended_header_is_honoured():
    content = archive(pax({"size": b"700"}), block("a.jpg") + b"x" * 700 + b"\0" * 324, pair("b"))
    assert [s.image for s in read(content).samples] == [(1536, 700), (3072, len(JPEG))]


@pytest.mark.parametrize("records", [{"GNU.sparse.map": b"0,1"}, {"GNU.sparse.size": b"9"}, {"GNU.sparse.major": b"1"}])
def test_files_with_holes_are_refused(records):
    with pytest.raises(DataError, match="has holes"):
        read(archive(pax(records), member("a.jpg", JPEG)))


# Hidden members and names of fields -----------------------------------------------------------------------------------


def test_hidden_members_are_left_out_and_counted(shard, caplog, capsys):
    mac = [member(f"./._{k}.{e}", b"\0\5\x16\7") for k in "ab" for e in ("jpg", "txt")]
    mac += [member("__MACOSX/a.jpg", b"x"), member("d/__MACOSX/._a.txt", b"x"), member(".DS_Store"), member(".x/a.jpg")]
    path = shard(archive(*mac[:5], pair("./a"), *mac[5:], pair("./b")))
    assert keys(path.read_bytes()) == ["a", "b"]
    assert readers(path) == (2, 2, 2)
    note = "left out 8 hidden members (._NAME, .NAME, __MACOSX/), e.g. './._a.jpg'"
    assert [record.message for record in caplog.records] == [f"{path}: {note}"] * 2  # training and streaming
    assert plan(path) == 0
    assert note in capsys.readouterr().out


def test_a_shard_of_hidden_members_only_is_named(shard, capsys):
    path = shard(archive(pair("._a")))
    for opened in (open_source, CaptionShards):
        with pytest.raises(DataError, match=r"no sample has .*s\.tar: its members are 2 hidden ones like '\._a\.jpg'"):
            opened(SourceConfig(str(path)))
    assert plan(path) == 2
    assert "2 hidden members" in capsys.readouterr().err


FIELDS = {
    "input and output": ("{}.input.jpg", "{}.output.txt"),
    "the image's file": ("{}.jpg", "{}.jpg.txt"),
    "the image's file, other endings": ("{}.v2.final.PNG", "{}.v2.final.PNG.json"),
    "one of them": ("d.e/{}.jpg", "d.e/{}.en.txt"),
}


@pytest.mark.parametrize("case", FIELDS)
def test_fields_with_names_of_their_own_are_read(case, shard):
    image, text = FIELDS[case]
    content = archive(*(m for i in range(3) for m in (member(image.format(i), b"x%d" % i), member(text.format(i)))))
    headers = read(content)
    owners = [image.removesuffix(".input.jpg").removesuffix(".jpg").removesuffix(".PNG").format(i) for i in range(3)]
    assert [(s.key, s.image.offset, s.whole) for s in headers.samples] == [
        (owners[i], 512 + i * 1536, True) for i in range(3)
    ]
    assert any(repr(image.format(0)) in note and repr(text.format(0)) in note for note in headers.notes)
    assert readers(shard(content)) == (3, 3, 3)
    assert keys(content + content) == owners + [f"{owner}#2" for owner in owners]


AMBIGUOUS = {
    "two images": (
        ["{}.input.jpg", "{}.output.jpg", "{}.prompt.txt"],
        "60 like '10.input.jpg', 30 like '10.prompt.txt'",
    ),
    "two languages": (["{}.jpg", "{}.en.txt", "{}.de.txt"], "60 like '10.en.txt', 30 like '10.jpg'"),
    "numbers, which are no names": (["{}.0.jpg", "{}.5.txt"], "30 like '10.0.jpg', 30 like '10.5.txt'"),
    "an ending that is not known": (["{}.jpg", "{}.words"], "30 like '10.jpg', 30 like '10.words'"),
    "other names": (["image-{}.jpg", "text-{}.txt"], "30 like 'image-10.jpg', 30 like 'text-10.txt'"),
}


@pytest.mark.parametrize("case", AMBIGUOUS)
def test_a_shard_without_a_whole_sample_is_refused_by_names(case, shard, capsys):
    names, seen = AMBIGUOUS[case]
    path = shard(archive(*(member(name.format(i), b"x") for i in range(10, 40) for name in names)))
    message = f"its members are {seen}; expected NAME.jpg (or .png"
    for opened in (open_source, CaptionShards):
        with pytest.raises(DataError, match="no sample has") as caught:
            opened(SourceConfig(str(path)))
        assert f"s.tar: {message}" in str(caught.value)
    assert plan(path) == 0  # nothing is damaged, and an image needs no text there; but it is said
    assert f"have an image and a text: {message}" in capsys.readouterr().out


def test_an_image_without_a_text_is_nothing_to_tell(shard):
    assert read(archive(*(member(f"{i}.jpg", b"x") for i in range(30)))).notes == []
    whole = [m for i in range(30) for m in (member(f"{i}.jpg", b"x"), member(f"{i}.txt", b"x"), member(f"{i}.npy"))]
    assert read(archive(*whole)).notes == []


def test_a_shard_that_has_become_shorter_gives_bad_samples(shard):
    path = shard(archive(pair("a"), pair("b")))
    source = open_source(SourceConfig(str(path)))
    path.write_bytes(path.read_bytes()[:2600])
    assert source[0].captions == ["text"]
    with pytest.raises(BadSample, match="it has become shorter"):
        source[1]


def test_remote_shards_go_through_the_same_function(tmp_path):
    import fsspec

    files = fsspec.filesystem("memory")
    files.pipe("/tars/both.tar", archive(pair("a")) + archive(pair("b")))
    files.pipe("/tars/torn.tar", WHOLE[:1024] + b"\0" * 512 + WHOLE[1536:])
    try:
        assert index_tar("memory://tars/both.tar")[0]["key"].to_pylist() == ["a", "b"]
        table, damage, _ = index_tar("memory://tars/torn.tar")
        assert (table.num_rows, damage.startswith("zeros from byte 1,024 to 1,536")) == (1, True)
    finally:
        files.rm("/tars", recursive=True)
