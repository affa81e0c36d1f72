"""The contact sheet of an evaluation says what is real, what is imagined, and when."""

import numpy as np

from worldmodel.training.measure import Report
from worldmodel.training.plots import BAND, MARGIN, PAPER, contact_sheet


def test_rows_and_columns_are_labelled_beside_the_pictures() -> None:
    rng = np.random.default_rng(0)
    shape = (1, 3, 2, 32, 48, 3)
    report = Report(
        {"context_chunks": 2, "endurance": {"chunks": 50}},
        {name: rng.integers(256, size=shape, dtype=np.uint8) for name in ("real", "open_loop")}
        | {"endurance": np.zeros((2, 5, 32, 48, 3), np.uint8)},
    )
    sheet = contact_sheet(report)
    assert sheet.shape == (2 * BAND + 4 * 64, MARGIN + 5 * 96, 3)
    for row, name in enumerate(("real", "open_loop")):
        top = BAND + 64 * row
        shown = sheet[top : top + 64 : 2, MARGIN : MARGIN + 3 * 96 : 2]
        np.testing.assert_array_equal(shown, np.concatenate(list(report.pictures[name][0, :, -1]), axis=1))
        assert (sheet[top : top + 64, :MARGIN] < PAPER).any()
    for column in range(3):
        assert (sheet[BAND // 2 : BAND, MARGIN + 96 * column :][:, :96] < PAPER).any()
