"""The wgpu-py backend: command buffers encoded ahead, and a device that is lost."""

import asyncio

import pytest
from probe import greedy, run_engine
from tiny import write_tiny

from realm_web.errors import DeviceLost, OutOfDeviceMemory
from realm_web.runtime.adapters import list_adapters, open_device

pytest.importorskip("wgpu", reason="wgpu is not installed")


PROMPT = [3, 1, 4]


@pytest.fixture(scope="module")
def tiny_path(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("tiny") / "tiny.gguf", context=512, seed=3).path


def test_command_buffers_are_encoded_ahead_for_what_runs_again_and_dropped_in_the_end(tiny_path):
    from realm_web.runtime.webgpu_replay import AHEAD

    async def work(engine):
        first = await greedy(engine, PROMPT, 24)
        assert await greedy(engine, PROMPT, 24) == first
        decode = next(
            p.replay for bucket, p in engine.runner._programs.items() if bucket.n_rows == 1 and p.replay
        )
        prompt = next(
            p.replay for bucket, p in engine.runner._programs.items() if bucket.n_rows > 1 and p.replay
        )
        assert decode.n_ordered == AHEAD and prompt.n_ordered == 0
        return engine.device.backend._ahead, decode

    ahead, decode = run_engine(tiny_path, "webgpu", work)
    assert decode.n_ordered == 0 and decode.ready.empty() and ahead._threads == []


def test_the_stock_of_the_least_recently_used_program_is_dropped(tiny_path):
    from realm_web.runtime.webgpu_replay import AHEAD, HOT

    async def work(engine):
        device = engine.device
        buffer = device.alloc(256, "probe")
        replays = []
        for i in range(HOT + 1):
            program = device.program(f"copy {i}")
            program.readback = device.view(buffer)
            for _ in range(3):
                await device.submit(program)
            replays.append(program.replay)
        return [replay.n_ordered for replay in replays]

    assert run_engine(tiny_path, "webgpu", work) == [0] + [AHEAD] * HOT


def test_two_programs_that_take_turns_get_a_stock_each(tiny_path):
    from realm_web.runtime.webgpu_replay import AHEAD

    async def work(engine):
        device = engine.device
        buffer = device.alloc(256, "probe")
        programs = [device.program(f"copy {i}") for i in range(5)]
        for program in programs:
            program.readback = device.view(buffer)
        for program in [*programs, *programs, *programs[:2] * 2]:
            await device.submit(program)
        return [program.replay.n_ordered for program in programs]

    assert run_engine(tiny_path, "webgpu", work) == [AHEAD, AHEAD, 0, 0, 0]


def counted(device, n: int):
    """A program that n runs of make a difference to, and its recording."""
    buffer = device.alloc(256, "probe")
    program = device.program("copy")
    program.readback = device.view(buffer)
    return buffer, program


def test_a_lost_device_says_so_to_everybody_who_waits_and_to_everybody_who_comes_later():
    async def main():
        device = await open_device("webgpu")
        buffer, program = counted(device, 1)
        for _ in range(3):
            await device.submit(program)
        waiting = device.submit(program)
        heard = []
        device.submit(program).then(heard.append)
        device.backend.device.destroy()
        for work in (
            lambda: waiting,
            lambda: device.submit(program),
            lambda: device.read(buffer),
        ):
            with pytest.raises(DeviceLost, match="is gone"):
                await work()
        with pytest.raises(DeviceLost):
            device.write(buffer, bytes(16))
        with pytest.raises(DeviceLost):
            device.alloc(256, "more")
        await asyncio.sleep(0)
        assert [type(error) for error in heard] == [DeviceLost]
        device.free(buffer)
        device.close()

    asyncio.run(main())


def test_memory_that_is_not_there_is_told_from_a_lost_device():
    async def main():
        device = await open_device("webgpu")
        device.limits = device.limits.__class__(**{**vars(device.limits), "max_buffer": 1 << 62})
        with pytest.raises(OutOfDeviceMemory, match="no room for everything"):
            device.alloc(1 << 50, "everything")
        assert len(await device.read(device.alloc(256, "little"))) == 256
        device.close()

    asyncio.run(main())


def test_a_software_adapter_tells_how_much_memory_the_machine_has():
    software = [info for info in list_adapters() if info.kind == "webgpu" and info.is_cpu]
    if not software:
        pytest.skip("no software rasteriser")
    assert all(info.limits.memory > 1 << 20 for info in software)
