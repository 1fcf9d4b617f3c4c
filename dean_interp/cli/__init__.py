"""The command `dean-interp`: arguments in `arguments.py`, what a step does in `steps.py`, its end in `ending.py`."""
