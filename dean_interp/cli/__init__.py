"""The command `dean-interp`: arguments in `arguments.py`, what a step does in `steps.py`, how it ends in `ending.py`."""
