"""``python -m router.render_process``: renders one chat template, as `ProcessRenderer` starts it.

Reads its setup from stdin, then questions; writes an answer to each to stdout. The kernel counts the time: a
rendering that uses more is ended by SIGPROF in the middle of whatever it does. Knows nothing of the cluster.
Invariant: it ends with its parent.
"""

from __future__ import annotations

import resource
import signal
import sys
from typing import Any

import orjson

from router.renderer import LENGTH
from splitserve.errors import InvalidRequest
from splitserve.process import end_with_parent
from splitserve.text import ChatTemplate


def main() -> None:
    end_with_parent()
    setup = _read()
    if setup is None:
        return
    resource.setrlimit(resource.RLIMIT_AS, (setup["memory_bytes"],) * 2)
    template = ChatTemplate(setup["source"], setup["special_tokens"], setup["max_chars"])
    while (question := _read()) is not None:
        signal.setitimer(signal.ITIMER_PROF, setup["seconds"])
        answer = _render(template, question)
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(LENGTH.pack(len(answer)) + answer)
        sys.stdout.buffer.flush()


def _render(template: ChatTemplate, question: dict[str, Any]) -> bytes:
    try:
        text = template.render(question["messages"], None, question["add_generation_prompt"])
        return orjson.dumps({"text": text})
    except InvalidRequest as error:
        return orjson.dumps({"refusal": error.message})
    except orjson.JSONEncodeError:
        return orjson.dumps({"refusal": "the chat template writes half a surrogate pair"})


def _read() -> dict[str, Any] | None:
    """The next message; ``None`` at the end."""
    head = sys.stdin.buffer.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    message: dict[str, Any] = orjson.loads(sys.stdin.buffer.read(LENGTH.unpack(head)[0]))
    return message


if __name__ == "__main__":
    main()
