"""Coverage-guided fuzzing of everything between the bytes of a GGUF file and its first tokens.

    pip install atheris
    python tests/fuzz/fuzz_load.py -max_total_time=60

Only a RealmError of one line may come out, in bounded time and memory (`mutants.attempt`). It begins with
valid tiny models and keeps what reached new code in a corpus folder: the first argument that is none of
libFuzzer's options, else `build/fuzz`. A file that breaks the rule is written as `crash-...` in the working
directory:

    python tests/fuzz/fuzz_load.py crash-...
"""

import random
import sys
import warnings
from pathlib import Path

import atheris

REPOSITORY = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]
with atheris.instrument_imports(include=["realm_web"]):
    import mutants

MAX_LENGTH = 1 << 20


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """Something wrong in what the file means; in its bytes where that fails, and now and then."""
    rng = random.Random(seed)
    if rng.random() < 0.8:
        try:
            parts = mutants.take_apart(bytes(data))
            for _ in range(rng.choice((1, 1, 2, 4))):
                parts = mutants.mutate(parts, rng)
            mutated = parts.file()
        except Exception:  # a file that is broken already, or lists too short for the mutation
            mutated = b""
        if 0 < len(mutated) <= max_size:
            return mutated
    return atheris.Mutate(data, max_size)


def write_seeds(corpus: Path) -> None:
    corpus.mkdir(parents=True, exist_ok=True)
    for name in mutants.MODELS:
        file = mutants.model(name).file()
        for suffix, data in (("", file), ("-packed", file + b"\0")):  # an odd length: see mutants
            (corpus / f"seed-{name}{suffix}").write_bytes(data)


def main() -> None:
    warnings.simplefilter("ignore")  # numpy's, of weights that are no numbers
    arguments = sys.argv[1:]
    if all(argument.startswith("-") for argument in arguments):
        corpus = REPOSITORY / "build" / "fuzz"
        write_seeds(corpus)
        arguments.append(str(corpus))
    options = [sys.argv[0], f"-max_len={MAX_LENGTH}", "-timeout=60", "-rss_limit_mb=3000", *arguments]
    atheris.Setup(options, mutants.attempt, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
