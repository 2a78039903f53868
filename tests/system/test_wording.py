from nnunet_ssl.system.wording import counted


def test_one_is_not_plural():
    assert [counted(number, "scan") for number in (0, 1, 2)] == ["0 scans", "1 scan", "2 scans"]
    assert [counted(number, "scan is", "scans are") for number in (1, 3)] == ["1 scan is", "3 scans are"]
