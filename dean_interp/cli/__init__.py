"""The command `dean-interp`: arguments in `arguments.py`, what each step does in `steps.py`."""
