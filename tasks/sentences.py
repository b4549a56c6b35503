"""Shows an error that is meant for the user as one sentence, once, instead of a traceback for each of Prefect's levels.

Prefect reports an error once for its task, once for its flow and once more for the process that ran them, each with
some forty lines of its own calls, and then again in the final state of the task or flow. Any other error keeps its
traceback: it is a fault of this program.
"""

import logging
import re

from deepfloyd_core.errors import DeepFloydError

_ENDED = re.compile(r"(Finished in state \w+)\(.*\)\s*", re.DOTALL)


class _Sentence(logging.Filter):
    """The filter of one handler, which shows each error once."""

    def __init__(self) -> None:
        super().__init__()
        self.told: str | None = None

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the handler shows a record. A record of such an error is changed to its sentence."""
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, DeepFloydError):
            record.sentence = str(error)
            record.msg, record.args, record.exc_info, record.exc_text = f"error: {error}", (), None, None
        ended = _ENDED.fullmatch(str(record.msg)) if self.told else None
        if ended and repr(self.told)[1:-1] in str(record.msg):
            record.msg = ended[1]
        sentence = getattr(record, "sentence", None)  # also where the filter of another handler was first
        if sentence is None:
            return True
        known, self.told = self.told, sentence
        return bool(known != sentence)


def tell_in_sentences() -> None:
    """From now on filter all existing handlers like this. After this call each error is shown anew."""
    loggers = [logging.getLogger(), *map(logging.getLogger, list(logging.root.manager.loggerDict))]
    for handler in {handler for logger in loggers for handler in logger.handlers}:
        filters = [known for known in handler.filters if isinstance(known, _Sentence)]
        if filters:
            filters[0].told = None
        else:
            handler.addFilter(_Sentence())
