"""Times of kernels on every device; what is timed runs as it would without."""

import asyncio
import time

import pytest
from probe import greedy, run_engine
from tiny import write_tiny

from realm_web.errors import DeviceError
from realm_web.runtime import profiler
from realm_web.runtime.adapters import open_device

DEVICES = ["cpu", "webgpu"]


PROMPT = [3, 1, 4]


@pytest.fixture(scope="module")
def tiny_path(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("tiny") / "tiny.gguf", context=512, seed=3).path


@pytest.mark.parametrize("device", DEVICES)
def test_every_step_of_a_program_is_timed(tiny_path, device):
    async def work(engine):
        await greedy(engine, PROMPT, 4)
        program = next(p for bucket, p in engine.runner._programs.items() if bucket.n_rows == 1 and p.replay)
        return program, await engine.device.time_program(program, runs=3)

    program, seconds = run_engine(tiny_path, device, work)
    assert len(seconds) == len(program.steps)
    assert all(0 <= s < 1 for s in seconds) and sum(seconds) > 0


@pytest.mark.parametrize("device", DEVICES)
def test_a_whole_program_is_timed_as_one(tiny_path, device):
    async def work(engine):
        await greedy(engine, PROMPT, 4)
        program = next(p for bucket, p in engine.runner._programs.items() if bucket.n_rows == 1 and p.replay)
        time_program = engine.device.time_program
        return await time_program(program, whole=True), await time_program(program)

    (whole,), each = run_engine(tiny_path, device, work)
    assert max(each) < whole < 100 * sum(each)


@pytest.mark.parametrize("device", DEVICES)
def test_the_time_of_the_host_is_split_into_submitting_and_handing_on(tiny_path, device):
    async def work(engine):
        plain = await greedy(engine, PROMPT, 12)
        times = engine.device.trace = profiler.HostTime()
        start = time.perf_counter()
        assert await greedy(engine, PROMPT, 12) == plain
        return times, time.perf_counter() - start

    times, seconds = run_engine(tiny_path, device, work)
    assert times.n_steps >= 12 and times.last is not None
    assert times.submitting > 0 and times.handing_on > 0
    assert times.submitting + times.handing_on < seconds


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("timestamps", [True, False])
def test_a_profile_counts_every_step_once(tiny_path, device, timestamps):
    async def work(engine):
        await greedy(engine, PROMPT, 4)
        if not timestamps:
            engine.device.features -= {"timestamps"}
        program = next(p for bucket, p in engine.runner._programs.items() if bucket.n_rows == 1 and p.replay)
        return program, await profiler.profile(engine.device, program, runs=2)

    program, times = run_engine(tiny_path, device, work)
    assert sum(kind.count for kind in times) == len(program.steps)
    assert any("blk.*." in kind.label for kind in times)
    table = profiler.lines("decode", times)
    assert len(table) == len(times) + 2 and len({len(line) for line in table}) == 1


@pytest.mark.parametrize("device", DEVICES)
def test_a_trace_writes_a_table_and_leaves_the_answer_as_it_is(tiny_path, device, monkeypatch, capsys):
    n = profiler.WARM_UP + profiler.TIMED_RUNS + 8
    plain = run_engine(tiny_path, device, lambda engine: greedy(engine, PROMPT, n))
    monkeypatch.setenv("REALM_DEBUG", "2")
    assert run_engine(tiny_path, device, lambda engine: greedy(engine, PROMPT, n)) == plain
    written = capsys.readouterr().err
    assert "us each" in written and "sum" in written and "blk.*.ffn_down" in written


def test_a_device_without_timestamps_says_so(tiny_path):
    async def main():
        device = await open_device("cpu")
        device.features -= {"timestamps"}
        await device.time_program(device.program("nothing"))

    with pytest.raises(DeviceError, match="cannot write timestamps"):
        asyncio.run(main())


def test_a_program_of_too_many_steps_is_not_timed():
    async def main():
        device = await open_device("cpu")
        program = device.program("long")
        program.steps = [None] * (profiler.MAX_TIMED + 1)
        await device.time_program(program)

    with pytest.raises(DeviceError, match="2049 steps, 2048 can be timed"):
        asyncio.run(main())
