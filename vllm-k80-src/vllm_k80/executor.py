"""Upstream's executor of several dies, which notices at once that one of them is gone."""

from threading import Event
from typing import Any

from vllm.v1.executor.multiproc_executor import MultiprocExecutor


class K80Executor(MultiprocExecutor):
    """`MultiprocExecutor` that waits for no answer any more when a worker has died.

    Upstream notices the death, and goes on waiting for the first worker, which waits for the dead
    one: for ``VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS``, 300.
    """

    uses_ray: bool = False  # upstream asks it of every class that is no name

    def start_worker_monitor(self) -> None:
        for worker in self.workers:
            _end_with(self.shutdown_event, worker.worker_response_mq)
        super().start_worker_monitor()


def _end_with(event: Event, queue: Any) -> None:
    upstream = queue.dequeue

    def dequeue(timeout: float | None = None, cancel: Event | None = None) -> Any:
        return upstream(timeout, cancel or event)

    queue.dequeue = dequeue
