"""An S3 server (moto) on 127.0.0.1, read through s3fs; others' programs, so that it runs with the slow tests."""

import time

import pytest
from test_stream import write

from blip.data.draws import Draws
from blip.data.formats import remote
from blip.data.formats.finding import find
from blip.data.formats.sources import open_source
from blip.data.prepare.captions import PrepareCaptions, open_captions
from blip.data.settings import DataConfig, SourceConfig
from blip.data.stream import Stream
from blip.data.transforms import TrainTransform
from blip.errors import DataError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "open",
            "AWS_SECRET_ACCESS_KEY": "sesame",
            "AWS_DEFAULT_REGION": "us-east-1",
            "OPENBLIP_CACHE": str(tmp_path_factory.mktemp("cache")),
        }.items():
            patch.setenv(name, value)
        import s3fs

        files = s3fs.S3FileSystem(skip_instance_cache=True)
        files.mkdir("bucket")
        yield files
    server.stop()


@pytest.fixture
def folder(s3, tmp_path, monkeypatch):
    """A folder of shards whose files are in the bucket, too."""
    monkeypatch.setattr(remote, "_stores", {})
    monkeypatch.setattr(remote, "_PAUSE", 0.01)
    for kind in ("tar", "parquet", "jsonl"):
        write(tmp_path, kind, 3, 8)
    for file in sorted(tmp_path.glob("s-*")):
        s3.put_file(str(file), f"bucket/x/{file.name}")
    return tmp_path


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["tar", "parquet", "jsonl"])
def test_batches_are_those_of_local_files(folder, tokenizer, kind, workers, streaming):
    batches = []
    for where in (folder, "s3://bucket/x"):
        source = SourceConfig(f"{where}/s-*.{kind}", image_root=str(folder) if kind == "jsonl" else None)
        config = DataConfig([source], remote=True, streaming=streaming, workers=workers, shuffle_buffer=8)
        prepare = PrepareCaptions(TrainTransform(16, config), tokenizer, config)
        feed = (Stream if streaming else Draws)(open_captions(config), prepare, 0)
        batches.append([(b.keys, b.bad, b.image.numpy().tobytes()) for b in feed.batches(0, 8, 0, 1, 4)])
    assert batches[0] == batches[1]


def test_objects_are_listed_and_known_by_their_tags(folder, s3):
    files = [one.path for one in find("s3://bucket/x/s-*.tar", remote=True)]
    assert [str(file) for file in files] == [f"s3://bucket/x/s-{i:03}.tar" for i in range(3)]
    assert [tuple(f.stat()) for f in files] == [
        (i["size"], i["ETag"]) for i in map(s3.info, (f"bucket/x/{f.name}" for f in files))
    ]
    with pytest.raises(DataError, match="no such file"):
        open_source(SourceConfig("s3://bucket/x/{7..8}.tar"), remote=True)
    with pytest.raises(DataError, match="no such file"):
        open_source(SourceConfig("s3://bucket/y/*.tar"), remote=True)
    with pytest.raises(DataError, match=r"no such file|denied"):
        open_source(SourceConfig("s3://other/y.tar"), remote=True)


def test_an_object_that_is_replaced_is_another(folder, s3, tokenizer):
    source = SourceConfig("s3://bucket/x/s-000.tar")
    first = open_source(source, remote=True).identity()
    config = DataConfig([source], remote=True, workers=1)
    feed = Draws(open_captions(config), PrepareCaptions(TrainTransform(16, config), tokenizer, config), 0)
    time.sleep(0.01)
    s3.put_file(str(folder / "s-001.tar"), "bucket/x/s-000.tar")
    with pytest.raises(DataError, match=r"s3://bucket/x/s-000.tar has changed while it was read"):
        list(feed.batches(0, 2, 0, 1, 4))
    assert open_source(source, remote=True).identity() != first
