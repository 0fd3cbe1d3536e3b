"""What is told about a run while it goes on: one stream of events (``event``), made by ``tracker``, to every sink.

``jsonl`` keeps them in the run's folder, ``wandb_sink`` sends them to Weights & Biases; ``settings`` is what users
say about the latter, and ``opening`` puts these together. Decisions one by one are the journal's, not events.
"""
