"""The runs: what each arm is, how one is trained and measured, which are made, and the file that they go to."""
