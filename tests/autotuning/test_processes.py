"""Which worker is gone."""

from sq_cpu.autotuning.processes import is_gone, this_worker


def test_a_process_that_reused_the_id_is_not_the_worker() -> None:
    me = this_worker()
    assert not is_gone(me)
    assert is_gone(me | {"started": "1"})
    assert not is_gone(me | {"started": "1", "machine": "elsewhere"})
