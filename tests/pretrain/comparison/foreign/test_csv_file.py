"""Whatever a CSV file holds becomes measurements or one sentence."""

import math
from pathlib import Path

import pytest

from data_pipeline.files.toml_config import ConfigError
from pretrain.comparison.foreign.csv_file import Measurement, read_measurements

HEADER = "arm,seed,step,tokens,modality,loss"


def read(tmp_path: Path, text: str | bytes) -> list[Measurement]:
    path = tmp_path / "runs.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_measurements(path)


def test_columns_may_stand_in_any_order_and_optional_ones_may_be_absent(tmp_path: Path) -> None:
    rows = (" 3.5 ,dense,1,text,1e6,1000.0,5e6,", "", "nan,mot,2,all,2e6,2000,,7", "")
    text = "\r\n".join(("loss,arm,seed,modality,tokens,step,size,seconds", *rows))
    one, two = read(tmp_path, "\ufeff" + text)
    assert one[1:] == ("dense", 1, 1000, 1e6, "text", 3.5, 5e6, None, None)
    assert two.arm == "mot" and math.isnan(two.loss) and two.size is None and two.seconds == 7
    assert one.place.endswith("runs.csv: row 1") and two.place.endswith("row 2")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"runs\.csv: empty; the first line of a log names its columns \(columns: arm, "),
        (HEADER + "\n", "names columns and holds no row"),
        ("arm,seed,step,token,modality,loss\n", 'unknown column "token"; did you mean "tokens"'),
        ("arm;seed;step;tokens;modality;loss\n", 'unknown column "arm;seed;step'),
        ("arm,seed,step,tokens,modality\n", "no column loss"),
        (HEADER + ",loss\n", 'the column "loss" is there twice'),
        (HEADER + "\ndense,1,10,100,text\n", "row 1: 5 cells under 6 columns"),
        (HEADER + "\n,1,10,100,text,3\n", 'row 1: arm = "": use letters, digits'),
        (HEADER + "\ndense,1,10,100,,3\n", 'row 1: modality = "": use letters'),
        (HEADER + "\ndense,1,10,100,<b>,3\n", 'row 1: modality = "<b>": use letters'),
        (HEADER + "\ndense,1.5,10,100,text,3\n", 'row 1: seed = "1.5": expected a whole number'),
        (HEADER + "\ndense,1,inf,100,text,3\n", 'row 1: step = "inf": expected a whole number'),
        (HEADER + "\ndense,1,10,0,text,3\n", 'row 1: tokens = "0": expected a number above 0'),
        (HEADER + "\ndense,1,10,100,text,\n", 'row 1: loss = "": expected a number; write nan for a loss'),
        (HEADER + "\ndense,1,10,100,text_to_image,3\n", 'a name with "_to_" stands for a conditional loss'),
        (HEADER + '\n"dense,1,10,100,text,3\n', "not valid CSV"),
        (b"PK\x03\x04\xff\xfe", "not a text file in UTF-8"),
    ],
)
def test_what_is_no_log_is_one_sentence(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        read(tmp_path, text)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.csv: no such file"):
        read_measurements(tmp_path / "nothing.csv")
