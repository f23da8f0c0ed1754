"""How a server ends: not before its requests, and not after its engine.

Upstream's server, told to stop, first ends its engine and then waits for answers that can no longer
come. Of an engine that was killed it notices nothing as long as requests wait for it, and it leaves
with status 0 when it does notice.
"""

import asyncio
import signal
from typing import Any

from vllm.logger import init_logger

logger = init_logger("vllm.k80.lifetime")

_LAST_WORDS = 10  # seconds for errors to be sent when the engine has died

_engine_died = False


def engine_died() -> bool:
    """Whether the server of this process has ended because its engine did."""
    return _engine_died


def _end_with_engine(server: Any, engine: Any) -> None:
    """In place of ``terminate_if_errored``, which upstream calls every 5 s and upon errors.

    Args:
        server: uvicorn's. engine: `AsyncLLM`.
    """
    from vllm import envs

    global _engine_died
    if envs.VLLM_KEEP_ALIVE_ON_ENGINE_DEATH or not engine.errored:
        return
    # Upstream means to, but in a thread that has no event loop: who waits for answers is not told.
    if waiting := engine.engine_core.resources.output_queue_task:
        waiting.cancel()
    # Answers there are none any more; nobody who does not read waits for one.
    server.config.timeout_graceful_shutdown = _LAST_WORDS
    if not server.should_exit:
        logger.error("The engine has died. This server ends with it.")
        _engine_died = server.should_exit = True


def install() -> None:
    """Replace what upstream's server does when it is told to stop, and when its engine dies."""
    import uvicorn
    from uvicorn.server import HANDLED_SIGNALS
    from vllm.entrypoints import launcher

    launcher.terminate_if_errored = _end_with_engine
    upstream = uvicorn.Server.serve

    async def serve(self: Any, *args: Any, **options: Any) -> None:
        # Upstream's handler cancels this task. uvicorn's, which follows, takes no new requests,
        # finishes those that there are, and sends itself the signal again.
        for number in HANDLED_SIGNALS:
            asyncio.get_running_loop().remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN)
        await upstream(self, *args, **options)

    uvicorn.Server.serve = serve
