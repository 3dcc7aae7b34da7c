"""How each thing is measured, in one way: time, memory, device reads, collectives. What is measured, and its rows."""
