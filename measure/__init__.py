"""What things cost and how they behave, measured: each file is a command, `python -m measure.x`."""
