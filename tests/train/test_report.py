"""What a person reads at a run's end."""

from train.report import shares


def test_the_shares_of_a_runs_time_leave_out_what_is_small_but_never_the_steps():
    assert shares({"steps": 94.0, "data": 0.4, "init": 2.0, "down": 3.6}) == "1 min 40 s: 94% steps, 2% init, 4% down"
    assert shares({"steps": 0.0, "init": 20.0}) == "20 s: 0% steps, 100% init"
