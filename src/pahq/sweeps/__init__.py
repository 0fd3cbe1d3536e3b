"""Grids of runs, each a process and a folder of its own, side by side on one machine.

``grid`` reads and judges, ``runs`` and ``command`` spread a grid out into commands, ``status`` keeps what is known on
disk, ``runner`` starts and watches processes (``job``), ``board`` and ``page`` show them.
"""
