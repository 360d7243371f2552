"""plumbing/errors.py: how a script ends."""
import pytest

from plumbing.errors import UserError, command


@pytest.mark.parametrize("error, code, said", [
    (UserError("mend it"), 2, ": mend it\n"), (FileNotFoundError(2, "No such file", "x.txt"), 2, "'x.txt'\n"),
    (KeyboardInterrupt(), 130, "")])
def test_a_script_ends_without_a_traceback(error, code, said, capsys):
    def main():
        raise error
    with pytest.raises(SystemExit) as stopped:
        command(main)
    printed = capsys.readouterr().err
    assert stopped.value.code == code and printed.endswith(said) and printed.count("\n") == said.count("\n")
