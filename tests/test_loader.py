"""Weights arrive on the device whole and in place, however the source delivers them."""

import asyncio
import random

import pytest
from tiny import write_tiny

from realm_web import loader
from realm_web.errors import FormatError, RequestError
from realm_web.loader import Loader, read_header
from realm_web.models import build
from realm_web.runtime.adapters import open_device
from realm_web.sources import FileSource

DEVICES = ["cpu", "webgpu"]


@pytest.fixture(scope="module")
def tiny_path(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("tiny") / "tiny.gguf", context=512, seed=3).path


class Slow(FileSource):
    """Reads that end in another order than they began, and count how many are under way."""

    def __init__(self, path):
        super().__init__(path)
        self.draw, self.under_way, self.most = random.Random(5), 0, 0

    async def read(self, offset, nbytes):
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        for _ in range(self.draw.randrange(8)):
            await asyncio.sleep(0)
        self.under_way -= 1
        return await super().read(offset, nbytes)


async def loaded(device, source):
    """The bytes of every shard after loading."""
    gguf = await read_header(source)
    model = build(gguf, device)
    work = Loader(device, model, gguf, source)
    await device.compile()
    await work.load()
    weights = {name: target.to for name, target in model.targets.items() if hasattr(target.to, "shards")}
    return {
        (name, i, j): await device.read(part.buffer, part.offset, part.nbytes)
        for name, weight in weights.items()
        for i, shard in enumerate(weight.shards)
        for j, part in enumerate(shard.parts)
    }


@pytest.mark.parametrize("device", DEVICES)
def test_small_chunks_from_a_slow_source_load_the_same_weights(tiny_path, device, monkeypatch):
    async def main():
        opened = await open_device(device)
        opened.features -= {"dense"}
        whole = await loaded(opened, FileSource(tiny_path))
        monkeypatch.setattr(loader, "STAGING_BYTES", 4096)
        slow = Slow(tiny_path)
        assert await loaded(opened, slow) == whole
        assert slow.most == loader.READS
        assert any(any(data) for data in whole.values())
        opened.close()

    asyncio.run(main())


def test_progress_reaches_the_total_and_never_goes_back(tiny_path):
    async def main():
        device, source = await open_device("cpu"), FileSource(tiny_path)
        gguf = await read_header(source)
        work = Loader(device, build(gguf, device), gguf, source)
        await device.compile()
        seen = []
        await work.load(lambda done, total: seen.append((done, total)))
        assert [done for done, _ in seen] == sorted(done for done, _ in seen)
        assert seen[-1][0] == seen[-1][1]

    asyncio.run(main())


def test_a_source_that_fails_half_way_leaves_no_read_under_way(tiny_path):
    class Failing(Slow):
        async def read(self, offset, nbytes):
            if offset > self.size // 2:
                raise FormatError("the disk is gone")
            return await super().read(offset, nbytes)

    async def main():
        device, source = await open_device("cpu"), Failing(tiny_path)
        with pytest.raises(FormatError, match="the disk is gone"):
            await loaded(device, source)
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


def test_a_mapped_file_reads_as_the_file_and_pads_its_end_to_words(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(range(101)))
    source = FileSource(path)

    async def main():
        assert bytes(await source.read(8, 20)) == bytes(range(8, 28))
        assert bytes(await source.read(96, 16)) == bytes(range(96, 101)) + bytes(3)
        assert await source.read_bytes(99, 50) == bytes([99, 100])
        piece = await source.read(0, 64)
        source.close()
        assert bytes(piece) == bytes(range(64))  # what was handed on stays readable

    asyncio.run(main())


def test_an_empty_file_and_a_missing_one_are_named(tmp_path):
    empty = tmp_path / "empty.gguf"
    empty.touch()
    with pytest.raises(FormatError, match=r"empty\.gguf"):
        asyncio.run(read_header(FileSource(empty)))
    with pytest.raises(RequestError, match="No such file"):
        FileSource(tmp_path / "missing.gguf")
