"""A lock file lets one run at a time through, says who it is, and does not outlive its holder."""

import json
import multiprocessing
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from nnunet_ssl.system import lock
from nnunet_ssl.system.lock import identity, is_gone, locked, refuse_if_held

HOLDER = """
import sys, time
from pathlib import Path
from nnunet_ssl.system.lock import locked
with locked(Path(sys.argv[1]), "training in FOLDER"):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def file(tmp_path):
    return tmp_path / ".lock"


@pytest.fixture
def holder(file):
    """Another process that holds the lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(file)], stdout=subprocess.PIPE, encoding="utf-8")
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def write(file, **changes):
    file.write_text(json.dumps(identity() | {"since": "2026-01-01 10:00:00+00:00", "doing": "training"} | changes))


def test_the_lock_is_a_file_for_the_time_of_the_block(file):
    with locked(file, "training"):
        assert file.is_file()
    assert not file.exists()
    with pytest.raises(ZeroDivisionError), locked(file, "training"):
        raise ZeroDivisionError
    assert not file.exists()


def test_the_second_run_is_refused_and_told_who_the_first_is(file, holder):
    noted = file.read_bytes()
    words = rf"Process {holder.pid} on {platform.node()} has been training in FOLDER since \d{{4}}-\d\d-\d\d .*:\d\d"
    with pytest.raises(RuntimeError, match=words), locked(file, "training in FOLDER"):
        pytest.fail("two at once")
    assert file.read_bytes() == noted


def test_a_second_run_in_the_same_process_is_refused_too(file):
    with locked(file, "a"), pytest.raises(RuntimeError, match=f"Process {os.getpid()}"), locked(file, "b"):
        pytest.fail("two at once")


def test_a_lock_of_a_killed_run_is_taken_over(file, holder):
    os.kill(holder.pid, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while lock.start_of(holder.pid) != "ended" and time.monotonic() < deadline:
        time.sleep(0.01)  # it stays in the table of processes until its parent asks for its end
    with locked(file, "training"):
        assert json.loads(file.read_text())["pid"] == os.getpid()
    assert list(file.parent.iterdir()) == []


def test_a_process_that_has_the_number_of_a_killed_one_does_not_hold_its_lock(file):
    write(file, start="an earlier boot 17")
    with locked(file, "training"):
        assert json.loads(file.read_text())["start"] == identity()["start"]


@pytest.mark.parametrize("place", ["host", "namespace"])
def test_a_lock_of_another_computer_is_kept_while_it_shows_life(file, place):
    write(file, pid=1, **{place: "elsewhere"})
    with pytest.raises(RuntimeError, match=f"remove {file}"):
        refuse_if_held(file)
    old = time.time() - lock.LOST - 1
    os.utime(file, (old, old))
    refuse_if_held(file)
    assert not file.exists()


@pytest.mark.parametrize("lives", [False, True])
def test_whether_a_holder_on_another_computer_lives_is_waited_for(lives, file, monkeypatch, capsys):
    monkeypatch.setattr(lock, "HEARTBEAT", 0.05)
    monkeypatch.setattr(lock, "LOST", 60 if lives else 0.3)
    write(file, pid=1, host="elsewhere")
    ended = threading.Event()
    threading.Thread(target=lock.show_life if lives else lambda *_: None, args=(file, ended), daemon=True).start()
    try:
        if lives:
            with (
                pytest.raises(RuntimeError, match="Process 1 on elsewhere has been training"),
                locked(file, "training"),
            ):
                pytest.fail("two at once")
        else:
            with locked(file, "training"):
                assert json.loads(file.read_text())["pid"] == os.getpid()
    finally:
        ended.set()
    assert "Waiting for a sign of life of process 1 on elsewhere, training since 2026" in capsys.readouterr().out


def test_where_a_holder_on_another_computer_ends_meanwhile_this_run_begins_anew(file, monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT", 0.05)
    write(file, pid=1, host="elsewhere")
    threading.Timer(0.2, file.unlink).start()
    with pytest.raises(RuntimeError, match=r"just ended: process 1 on elsewhere.* Run this again"), locked(file, "it"):
        pytest.fail("with what was there before")


def test_a_clock_that_is_ahead_does_not_make_it_wait_longer(file, monkeypatch):
    monkeypatch.setattr(lock, "LOST", 0.3)
    write(file, pid=1, host="elsewhere")
    os.utime(file, (time.time() + 3600, time.time() + 3600))
    with locked(file, "training"):
        pass


@pytest.mark.parametrize("by", [-3600, 3600])
def test_a_clock_of_this_computer_that_is_wrong_takes_no_lock_away(by, file, monkeypatch):
    write(file, pid=1, host="elsewhere")
    monkeypatch.setattr(lock, "time", SimpleNamespace(time=lambda: time.time() + by, monotonic=time.monotonic))
    with pytest.raises(RuntimeError, match="Process 1 on elsewhere"):
        refuse_if_held(file)
    os.utime(file, (time.time() - 2 * lock.LOST,) * 2)
    refuse_if_held(file)
    assert list(file.parent.iterdir()) == []  # nothing of the question for the time is left either


@pytest.mark.skipif(shutil.which("ps") is None, reason="there is no ps")
def test_ps_tells_when_a_process_began(holder):
    assert lock.start_by_ps(holder.pid) == lock.start_by_ps(holder.pid) is not None
    assert lock.start_by_ps(holder.pid) != lock.start_by_ps(os.getppid())
    assert lock.start_by_ps(2**22 + 1) is None


def test_a_job_that_a_cluster_has_put_back_into_its_queue_takes_its_own_lock_over(file, monkeypatch):
    write(file, host="elsewhere", job="4711", restart=None)
    with pytest.raises(RuntimeError):
        refuse_if_held(file)
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    refuse_if_held(file)
    assert not file.exists()


def test_a_holder_shows_life(file, monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT", 0.01)
    with locked(file, "training"):
        os.utime(file, (1, 1))
        deadline = time.monotonic() + 20
        while file.stat().st_mtime < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert time.time() - file.stat().st_mtime < 20


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 1}'])
def test_a_lock_that_was_cut_off_is_taken_over(file, text, monkeypatch):
    monkeypatch.setattr(lock, "UNWRITTEN", 0.1)
    file.write_text(text)
    with locked(file, "training"):
        pass
    assert not file.exists()


def test_a_lock_that_is_about_to_be_written_is_waited_for(file):
    file.touch()
    context = multiprocessing.get_context("fork")
    writer = context.Process(target=lambda: (time.sleep(0.3), write(file, pid=os.getppid(), start=None)))
    writer.start()
    with pytest.raises(RuntimeError, match=f"Process {os.getpid()}"):
        refuse_if_held(file)
    writer.join()


def test_only_the_lock_that_was_looked_at_is_removed(file):
    file.write_text("another run's, which was faster")
    lock.remove(file, "a killed run's")
    assert file.read_text() == "another run's, which was faster"
    assert list(file.parent.iterdir()) == [file]


def test_a_lock_that_somebody_else_has_taken_is_left_to_them(file):
    with locked(file, "training"):
        file.write_text("another run's")
    assert file.read_text() == "another run's"


def test_another_users_process_counts_as_running(monkeypatch, file):
    def refuse(pid, number):
        raise PermissionError

    monkeypatch.setattr(os, "kill", refuse)
    monkeypatch.setattr(lock, "start_of", lambda pid: None)  # as where the system hides it
    assert not is_gone(identity() | {"pid": 99999999, "start": "x"}, file)
