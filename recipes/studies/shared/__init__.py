"""What the studies share: arms, runs, the file of rows, statistics, tables and figures."""
