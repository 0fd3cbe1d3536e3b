"""Mixed precision: number formats, policies that assign them, stored low-precision weights, and the scheduler."""
