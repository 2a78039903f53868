"""The table and the picture of a training."""

import io
import itertools
import math
from pathlib import Path

import matplotlib
import pytest
from matplotlib import style
from matplotlib.text import Text
from tiny_trainers import make_trainer

from nnunet_ssl.trainers.nnUNetTrainerMeanTeacher import nnUNetTrainerMeanTeacher
from nnunet_ssl.training import history as module
from nnunet_ssl.training.history import LOOKS, NAMES, History, draw

pytestmark = pytest.mark.pictures


@pytest.mark.parametrize(
    ("text", "kept"),
    [("epoch,loss\n0,1.5\n1,1.25\n2,", ["epoch,loss", "0,1.5"]), ("", None), ("epoch,loss\n5,1\n", None)],
)
def test_rows_that_are_trained_again_or_were_cut_off_are_dropped(text, kept, tmp_path):
    history = History(tmp_path)
    history.table.write_text(text)
    history.trim(1)
    assert (history.table.read_text(encoding="utf-8").split() if history.table.exists() else None) == kept


def test_other_columns_than_before_are_added_by_name(tmp_path):
    history = History(tmp_path)
    history.table.write_text("epoch,loss,b,a\n0,3.0,1.0,2.0\n")
    history.trim(1)
    history.append(1, {"loss": 7.0, "a": 3.0, "b": 4.0}, {"ramp": 0.5})
    history.append(2, {"loss": 7.0, "a": 5.0, "b": 2.0}, {"ramp": 1.0})
    lines = ["epoch,loss,b,a,ramp", "0,3.0,1.0,2.0,", "1,7.0,4.0,3.0,0.5", "2,7.0,2.0,5.0,1.0"]
    assert history.table.read_text(encoding="utf-8").split() == lines
    history.draw()
    assert history.picture.is_file()


def test_drawing_takes_a_small_part_of_the_time(tmp_path, monkeypatch):
    now, drawn = [0.0], []

    def slow(columns, other, boundary):
        drawn.append(now[0])
        now[0] += 0.5
        return draw(columns, other)

    monkeypatch.setattr(module, "draw", slow)
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    history = History(tmp_path)
    for epoch in range(20):
        now[0] += 30
        history.append(epoch, {"loss": 1.0}, {})
        history.draw(last=epoch == 19)
    assert drawn[0] == 30
    assert drawn[-1] > 600  # the last one always
    assert all(b - a >= 100 for a, b in itertools.pairwise(drawn[:-1]))  # 0.5 s are 0.5 % of 100 s
    assert len(drawn) > 4
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["losses.csv", "semi_supervised.png"]


def test_the_picture_has_its_own_fonts(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(module, "draw", lambda *args: figures.append(draw(*args)) or figures[0])
    with matplotlib.rc_context({"font.size": 30, "axes.titlesize": 30, "legend.fontsize": 30}):  # as nnU-Net leaves it
        history = History(tmp_path)
        history.append(0, {"loss": 1.0}, {"agreement": 0.5})
        history.draw()
    sizes = {text.get_fontsize() for text in figures[0].findobj(Text)}
    assert max(sizes) < 15


def labels(axis):
    return [text.get_text() for text in axis.get_legend().get_texts()]


def test_every_column_is_in_the_picture_with_names_and_units():
    columns = {"epoch": (0.0, 1.0), "loss": (1.0, 0.5), "low": (0.1, 0.2)} | dict.fromkeys(NAMES, (0.5, math.nan))
    columns |= dict.fromkeys(("dice_student", "dice_student_2"), (0.5, 0.6))
    figure = draw(columns, "student 2")
    assert [labels(axis) for axis in figure.axes] == [
        ["loss", "low"],
        ["student", "student 2"],
        ["Dice of student 2 and student", "confidence of student 2's foreground", "weight of the ramp-up"],
        ["labels", "labels by student 2"],
        ["between different patches"],
    ]
    looks = [{(line.get_color(), line.get_linestyle()) for line in axis.lines} for axis in figure.axes]
    assert [len(look) for look in looks] == [len(axis.lines) for axis in figure.axes] == [2, 2, 3, 2, 1]
    for axis in figure.axes:
        assert axis.get_title(loc="left")
        assert axis.get_ylabel()
    assert figure.axes[-1].get_xlabel() == "epoch"
    assert figure.axes[3].lines[0].get_ydata()[0] == 50  # percent


def test_a_panel_without_a_number_is_left_out():
    columns = {"epoch": (0.0, 1.0), "loss": (1.0, 0.5), "pseudo_confidence": (math.nan, math.nan)}
    (axis,) = draw(columns, "teacher").axes
    assert labels(axis) == ["loss"]


def test_legends_are_beside_the_axes_and_inside_the_picture():
    columns = {"epoch": (0.0, 1.0), **{f"a_term_with_a_long_name_{i}": (1.0, 0.5) for i in range(3)}}
    with style.context("default"):  # as when a training draws: nnU-Net's progress.png leaves huge fonts behind
        figure = draw(columns | dict.fromkeys(NAMES, (0.5, 0.6)), "student 2", 1)
        figure.savefig(io.BytesIO())  # places everything
    for axis in figure.axes:
        frame, legend = axis.get_window_extent(), axis.get_legend().get_window_extent()
        assert legend.x0 >= frame.x1
        assert legend.x1 <= figure.bbox.x1
        assert legend.y0 >= frame.y0


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_no_point_is_cut_at_the_border(value):
    columns = {"epoch": (7.0,), "loss": (value,), "dice_student": (value,)} | dict.fromkeys(NAMES, (value,))
    for axis in draw(columns, "teacher").axes:
        (bottom, top), (left, right) = axis.get_ylim(), axis.get_xlim()
        for line in axis.lines:
            (y,) = line.get_ydata()
            assert bottom + 0.02 * (top - bottom) < y < top - 0.02 * (top - bottom)
        assert (left, right) == (6.5, 7.5)


def test_after_one_epoch_the_axis_has_its_number_alone():
    axis = draw({"epoch": (0.0,), "loss": (1.0,)}, "teacher").axes[0]
    left, right = axis.get_xlim()
    assert [tick for tick in axis.get_xticks() if left <= tick <= right] == [0]


def test_the_line_between_the_phases_says_what_it_is():
    columns = {"epoch": (0.0, 1.0, 2.0), "loss": (1.0, 1.0, 1.0), "dice_student": (math.nan, 0.5, 0.5)}
    first, second = draw(columns, "teacher", boundary=1).axes
    assert labels(first) == ["loss", "semi-supervised phase\nfrom epoch 1"]
    assert labels(second) == ["student"]
    for axis in (first, second):  # at the same place in all
        assert axis.lines[-1].get_xdata() == [0.5, 0.5]
        assert axis.get_xlim() == first.get_xlim()
    assert labels(draw(columns, "teacher").axes[0]) == ["loss"]


def test_terms_of_single_epochs_are_points():
    nan = math.nan
    columns = {"epoch": (0.0, 1.0, 2.0), "always": (1.0, 2.0, 3.0), "once": (1.0, nan, nan), "some": (1.0, nan, 2.0)}
    lines = draw(columns, "teacher").axes[0].lines
    assert [line.get_marker() for line in lines] == ["None", "o", "o"]
    assert list(lines[2].get_markevery()) == [0, 2]


def test_a_method_with_many_terms_has_as_many_looks():
    assert len(set(LOOKS)) == len(LOOKS) == 30
    columns = {"epoch": (0.0,), **{f"term_{i}": (float(i),) for i in range(12)}}
    lines = draw(columns, "teacher").axes[0].lines
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 12


def test_without_any_finite_number_there_is_no_picture_and_no_error(tmp_path):
    history = History(tmp_path, "teacher")
    history.record(0, {"loss": float("nan")}, {}, [], last=True)
    assert not history.picture.exists()
    history.record(1, {"loss": 0.5}, {}, [], last=True)
    assert history.picture.is_file()


def test_a_row_that_is_being_written_is_none_and_a_damaged_table_is_named(tmp_path):
    history = History(tmp_path)
    assert history.columns() == {}
    history.table.write_text("epoch,loss\n0,1.5\n1")
    assert history.columns() == {"epoch": (0.0,), "loss": (1.5,)}
    for damage in ("epoch,loss\n0,x\n", "epoch;loss\n0;1.5\n", "epoch,loss\n,1.5\n", "\0" * 200_000):
        history.table.write_text(damage)
        with pytest.raises(ValueError, match=r"losses\.csv is damaged"):
            history.columns()


def test_a_row_that_was_cut_off_is_dropped_where_columns_come(tmp_path):
    history = History(tmp_path)
    history.table.write_text("epoch,loss\n0,1.5\n1")
    history.append(2, {"loss": 1.0}, {"ramp": 0.5})
    assert history.table.read_text(encoding="utf-8").split() == ["epoch,loss,ramp", "0,1.5,", "2,1.0,0.5"]


def test_a_table_that_another_program_has_saved_does_not_end_the_training(tiny_dataset):
    trainer = make_trainer(nnUNetTrainerMeanTeacher, tiny_dataset, num_epochs=2)
    table, end = Path(trainer.output_folder) / "losses.csv", trainer.on_epoch_end

    def saved_with_semicolons():
        end()
        if trainer.current_epoch == 1:
            table.write_text(table.read_text(encoding="utf-8").replace(",", ";"), encoding="utf-8")

    trainer.on_epoch_end = saved_with_semicolons
    trainer.run_training()
    assert trainer.current_epoch == 2
    log = Path(trainer.log_file).read_text(encoding="utf-8")
    assert log.count("WARNING: no table or picture of this epoch") == 1
    saved, said = table.read_text(encoding="utf-8"), []
    history = History(table.parent)
    history.begin(1, said.append)
    assert history.columns() == {}
    assert table.with_name("losses.damaged.csv").read_text(encoding="utf-8") == saved
    assert len(said) == 1
    assert "losses.csv is damaged (no column epoch, but epoch;loss" in said[0]


def test_a_table_that_cannot_be_written_is_a_warning(tiny_dataset, monkeypatch):
    def occupied(*arguments):
        raise PermissionError(13, "open in another program", "losses.csv")

    trainer = make_trainer(nnUNetTrainerMeanTeacher, tiny_dataset, num_epochs=1)
    monkeypatch.setattr(History, "append", occupied)
    trainer.run_training()
    log = Path(trainer.log_file).read_text(encoding="utf-8")
    assert "WARNING: no table or picture of this epoch ([Errno 13] open in another program" in log
    assert (Path(trainer.output_folder) / "checkpoint_final.pth").is_file()
