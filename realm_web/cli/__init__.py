"""The command line: one module per command, each with `add_arguments(parser)` and `main(args) -> exit code`.

A command module imports nothing heavy at its top: parsing arguments and `--help` stay instant. What a person
or a script asked for goes to stdout; progress, messages and errors go to stderr.
"""
