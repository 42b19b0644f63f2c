"""What other packages say goes into the run's log; what the user's own code says is shown."""

import logging
import sys
import warnings

from sfumato.commands.library_messages import in_the_log
from sfumato.run_folder import RunFolder


def test_messages_of_packages_are_in_the_log_once_and_not_on_the_terminal(tmp_path, capsys, monkeypatch):
    run = RunFolder.create(tmp_path / "run")
    shown: list[str] = []
    monkeypatch.setattr(warnings, "showwarning", lambda message, *_, **__: shown.append(str(message)))
    with in_the_log():
        logger = logging.getLogger("transformers")
        logger.addHandler(logging.StreamHandler(sys.stderr))  # as transformers does while it is imported
        logger.warning("before the run")
        with run.lock():
            for _ in range(3):
                logging.getLogger("transformers.models.any").warning("falling back to %s", "another")
                warnings.showwarning("Mismatch dtype", UserWarning, logging.__file__, 1)
        warnings.showwarning("mine", UserWarning, str(tmp_path / "loss.py"), 1)
    said = capsys.readouterr().err
    assert shown == ["mine"] and "falling" not in said and "Mismatch" not in said
    log = (run.path / "log.txt").read_text()
    assert [log.count(words) for words in ("before the run", "falling back to another", "Mismatch")] == [
        1,
        1,
        1,
    ]
