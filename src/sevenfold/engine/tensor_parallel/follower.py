"""A rank that does what the first one says."""

from sevenfold.engine.tensor_parallel.channel import Channel
from sevenfold.engine.tensor_parallel.messages import read_orders
from sevenfold.engine.worker import Worker


def follow(worker: Worker, channel: Channel) -> None:
    """Carry out orders until one of them ends it."""
    while True:
        for order in read_orders(channel.receive()):
            if order is None:
                return
            order(worker)
