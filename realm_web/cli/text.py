"""Numbers with units, and text from files that may be hostile, as a person should see them."""


def visible(text: str) -> str:
    """`text` from a file that may be hostile, on one line: line ends and terminal escapes become readable.

    >>> visible("two\\nlines \\x1b[31mred")
    'two⏎lines \\\\x1b[31mred'
    """
    text = text.replace("\n", "⏎")
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def human_bytes(count: float) -> str:
    """
    >>> human_bytes(98_362_432), human_bytes(512), human_bytes(4.3e12)
    ('93.8 MiB', '512 B', '3.9 TiB')
    """
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    step = 0
    while count >= 1024 and step < len(units) - 1:
        count, step = count / 1024, step + 1
    return f"{count:.0f} B" if step == 0 else f"{count:.1f} {units[step]}"


def human_count(count: int) -> str:
    """
    >>> human_count(134_515_008), human_count(960)
    ('134.5 M', '960')
    """
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**4, "k")):
        if count >= size:
            return f"{count / (10**3 if unit == 'k' else size):.1f} {unit}"
    return str(count)
