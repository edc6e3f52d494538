"""What commands refuse before MPI is started, and what they make of noise."""

import random
import statistics

import pytest

from mpicoll import cli
from mpicoll.cli.asked import Refusal
from mpicoll.cli.noise import Interval, interval

WRONG = {
    "": "required: COMMAND",
    "nonsense": "'nonsense'",
    "bench --kinds allreduce,foo": "must be of allreduce, .* but has 'foo'",
    "bench --kinds=": "but has ''",
    "bench --sizes 4,x": "whole numbers from 1 up, with commas, but has 'x'",
    "bench --sizes 0": "but has '0'",
    "bench --sizes -4": "but has '-4'",
    "bench --dtype int8": "'int8'",
    "bench --backend foo": "'foo'",
    "bench --budget nan": "a number of seconds above 0, but has 'nan'",
    "bench --budget inf": "but has 'inf'",
    "overhead --rounds 0": "a whole number from 1 up, but has '0'",
    "overhead --backend nccl": "'nccl'",
    "doctor --timeout -3": "a number of seconds above 0, but has '-3'",
    "demo --progress sometimes": "'sometimes'",
    "run": "PROGRAM",
    "trace": "DIR",
}


@pytest.mark.parametrize("line", WRONG)
def test_wrong_input_is_one_sentence_and_status_2(line, capsys, monkeypatch):
    with pytest.raises(Refusal, match=WRONG[line]):
        cli._parser("mpicoll").parse_args(line.split())
    monkeypatch.setattr("mpicoll.cli.asked.launchers", lambda environ: ())
    assert cli.main(line.split()) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and said.err.startswith("python -m mpicoll")


def test_right_input_is_read():
    args = cli._parser("mpicoll").parse_args(
        ["bench", "--sizes", "4,1000", "--kinds", "scan,barrier", "--budget", "2"]
    )
    assert (args.sizes, args.kinds, args.budget) == ([4, 1000], ["scan", "barrier"], 2.0)


def test_no_extra_is_a_sentence_that_names_it():
    missing = cli.asked.lacks("--plot", "json", "no_such_module", install="'mpicoll[demo]'")
    assert missing == "--plot needs no_such_module: pip install 'mpicoll[demo]'"
    assert cli.asked.lacks("--plot", "json", install="json") == ""
    with pytest.raises(Refusal, match="^rank 1: no file$"):
        cli.asked.agree(["", "no file", "no folder"])
    cli.asked.agree(["", ""])


def measured(truth, noise, count=200):
    dice = random.Random(1)
    # Bursts: 20 calls, one after the other, are all as slow.
    values = [truth + noise * dice.gauss(0, 1) for _ in range(count // 20) for _ in range(20)]
    bursts = [noise * dice.gauss(0, 1) for _ in range(count // 20)]
    values = [value + bursts[i // 20] for i, value in enumerate(values)]
    return interval(count, lambda part: statistics.median(values[part]))


def test_a_quiet_machine_tells_and_a_noisy_one_does_not():
    assert measured(1.5, 0.01).tells(1, 0.1), "it is faster"
    assert measured(1.0, 0.01).tells(1, 0.1), "they are as fast"
    assert not measured(1.05, 1.0).tells(1, 0.1)
    low, high = measured(1.5, 0.1)
    assert low < 1.5 < high


def test_few_values_are_their_own_blocks():
    values = [3.0, 1.0, 2.0]
    assert interval(3, lambda part: statistics.median(values[part])) == Interval(1.0, 3.0)
    values = [float(i) for i in range(16)]
    assert interval(16, lambda part: statistics.median(values[part])) == Interval(2.5, 12.5)
