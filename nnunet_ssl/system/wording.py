"""Messages in words."""


def counted(number: int, one: str, several: str | None = None) -> str:
    """A number and what is counted: "1 scan", "2 scans"; `several` where it is not `one` with an s."""
    return f"{number} {one if number == 1 else several or one + 's'}"


def one_line(error: Exception) -> str:
    """What an error says, in one line; the name of its kind where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__
