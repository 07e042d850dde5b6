"""Facts of the machine."""

from epic_quant import machine


def test_read_bandwidth_is_a_plausible_figure():
    assert 1e8 < machine.read_bandwidth(rounds=1) < 1e13


def test_the_processor_has_a_name():
    assert machine.cpu_name()


def test_available_memory_is_positive_or_not_reported():
    available = machine.available_nbytes()
    assert available is None or available > 0
