"""What `import epic_quant` gives, and what it leaves alone."""

import subprocess
import sys

import pytest

import epic_quant


@pytest.mark.parametrize("name", epic_quant.__all__)
def test_every_public_name_is_there(name):
    assert getattr(epic_quant, name).__name__ == name
    assert name in dir(epic_quant)


def test_a_name_that_is_not_public_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = epic_quant.nothing


@pytest.mark.parametrize("module", ["", ".inspection", ".predict", ".recipe.__main__", ".report.__main__"])
def test_torch_is_not_imported_before_it_is_needed(module):
    code = f"import epic_quant{module}; import sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("module", ["calibration", "export", "inspection", "predict", "recipe", "report"])
def test_command_lines_print_help_and_version(module, run_python):
    for option, expected in (("--help", "exit status: 0; "), ("--version", epic_quant.__version__)):
        status, printed = run_python("-m", f"epic_quant.{module}", option)
        assert status == 0
        assert expected in printed
