from nnunet_ssl.system.wording import counted, one_line


def test_one_is_not_plural():
    assert [counted(number, "scan") for number in (0, 1, 2)] == ["0 scans", "1 scan", "2 scans"]
    assert [counted(number, "scan is", "scans are") for number in (1, 3)] == ["1 scan is", "3 scans are"]


def test_an_error_is_one_line_and_never_empty():
    assert one_line(ValueError("first\n  second ")) == "first second"
    assert one_line(MemoryError()) == "MemoryError"
