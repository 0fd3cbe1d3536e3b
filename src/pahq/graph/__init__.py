"""Senders, receivers and the edges between them."""

from pahq.graph.graph import DIRECT, Graph
from pahq.graph.nodes import Receiver, Sender

__all__ = ["DIRECT", "Graph", "Receiver", "Sender"]
